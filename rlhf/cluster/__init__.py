"""Ray: starting or attaching, preflight, tasks, worker groups, and what their failures mean."""
