"""Ray's trainer with fewer processes that import less, and what the driver must know to end a group at any moment.

To import Ray Train takes a process seconds of a core, and torch as much again, while the ranks' own imports need it. So
no process serves Ray's datasets, which no stage reads; none gives back the room of a dead controller, which the driver
does; none asks the autoscaler for room, for which the placement group asks too; and only the ranks import torch.
"""

import os
from pathlib import Path
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal import constants
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import placement_group

from rlhf.cluster.worker import tell_meeting_point


class LeanTrainer(DataParallelTrainer):
    """Keeps its controller's handle, by which a group is ended whose processes only import yet.

    Its ranks know where they meet, and join the process group themselves.
    """

    controller: Any = None

    def __init__(self, train_loop_per_worker: Any, **arguments: Any) -> None:
        super().__init__(train_loop_per_worker, backend_config=_MeetingPoint(), **arguments)

    def _create_default_callbacks(self) -> list[Any]:
        unused = DatasetsCallback | PlacementGroupCleanerCallback
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unused)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        here = ray.get_runtime_context().get_node_id()
        beside_the_driver = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": here})(LeanTrainController)
        arguments["scaling_policy"] = _WithoutAutoscaler(arguments["scaling_policy"].scaling_config)
        self.controller = beside_the_driver.remote(**arguments)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())


class TellController(ControllerCallback):
    """Writes the controller's process id to a file: one that is stopped can only be killed by it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002 - Ray's signature
        """Called by Ray Train in the controller's process."""
        # The ranks have these variables from the session. Given once more, they would make Ray start each rank through
        # a program of its own, at a second of a core.
        constants.ENV_VARS_TO_PROPAGATE.clear()
        self._path.write_text(str(os.getpid()))


class _MeetingPoint(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _TellsMeetingPoint


class _TellsMeetingPoint(Backend):
    """Ranks meet where rank 0 is."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002 - Ray's signature
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(tell_meeting_point, address, port)


class _NamedWorkerGroup(WorkerGroup):
    """Its room has a name, ``storage_path`` of its run: Ray keeps a dead controller's until the driver ends."""

    def _create_placement_group(
        self,
        scaling_config: Any,  # noqa: ARG002 - Ray's signature
        worker_group_context: WorkerGroupContext,
    ) -> DefaultPlacementGroupHandle:
        bundles = [worker_group_context.resources_per_worker] * worker_group_context.num_workers
        name = str(self._train_run_context.run_config.storage_path)
        return DefaultPlacementGroupHandle(
            placement_group(bundles, strategy=worker_group_context.placement_strategy, name=name)
        )


class LeanTrainController(TrainController):
    """Gives its group's room a name."""

    worker_group_cls = _NamedWorkerGroup


class _WithoutAutoscaler(FixedScalingPolicy):
    def _send_resource_request(self) -> None:
        pass

    _maybe_send_resource_request = _cancel_resource_request = _send_resource_request
