#!/bin/sh
# A pipeline on a Ray cluster that runs already, by Ray's jobs: the driver runs on the head and outlives this terminal.
#
#   RAY_API_SERVER_ADDRESS=http://head-node:8265 sh examples/ray-job.sh --config rlhf.yaml ppo.kl.coef=0.1
#
# Cluster     every node as docs/cluster.md says, started with ray[default] installed (`pip install "ray[default]"`,
#             the version of constraints.txt), since jobs come in through the dashboard.
# Environment `rlhf` is the cluster's own, not sent along; so is the pipeline file, at the path that is given.
# Store       a path that all nodes see, or a bucket; a relative one would lie in a folder of the job's.
# Token       RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or ~/.ray/auth_token, here as on the cluster.
# Preemption  `ray job stop ID` sends SIGTERM and, as it is set below, waits 60 s: every rank saves first. When the head
#             or the job was lost, run this again: what is done is not done again, and the rest goes on.
set -eu
exec ray job submit \
  --no-wait \
  --submission-id "rlhf-$(date +%Y%m%d-%H%M%S)" \
  --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}' \
  -- rlhf run "$@"
