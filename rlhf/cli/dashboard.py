"""Command that lays out a project on W&B."""

from rlhf.cli.run import Request
from rlhf.errors import PreflightError, TryAgainError

OBJECTIVE, KL = "objective/scores", "objective/kl"
LAYOUT: dict[str, list[tuple[str, str]]] = {
    "policy: reward against KL": [
        (KL, OBJECTIVE),
        ("episode", OBJECTIVE),
        ("episode", KL),
        ("num_tokens", OBJECTIVE),
        ("episode", "objective/rlhf_reward"),
        ("episode", "kl/coef"),
    ],
    "policy: responses": [
        ("episode", "length/mean"),
        ("episode", "objective/entropy"),
        ("episode", "val/num_eos_tokens"),
        ("episode", "score/out_of_range"),
        ("episode", "rollout/kl_to_trained"),
        ("episode", "perf/tokens_per_s"),
    ],
    "policy: updates": [
        ("step", "loss/policy_avg"),
        ("step", "loss/value_avg"),
        ("step", "policy/clipfrac_avg"),
        ("step", "policy/approxkl_avg"),
        ("step", "val/ratio"),
        ("step", "lr"),
    ],
    "sft and reward model": [
        ("num_tokens", "loss"),
        ("num_tokens", "accuracy"),
        ("num_tokens", "mean_token_accuracy"),
        ("step", "grad_norm"),
    ],
}
"""Sections, and in each the panels: a metric for the x axis and one for the y axis."""


def dashboard(request: Request) -> None:
    """Make a view of the runs on Weights & Biases: reward against KL first. Each call makes another."""
    settings = request.config.tracking
    place = f"{settings.entity or 'your account'}/{settings.project}"
    for section, panels in LAYOUT.items():
        request.out.print(section, markup=False)
        request.out.print("\n".join(f"    {y} over {x}" for x, y in panels), markup=False)
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        raise PreflightError(
            f"this view was not made in {place}: there is no key of Weights & Biases",
            "WANDB_API_KEY",
            "set it, or run `wandb login`",
        )
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise PreflightError(
            f"this view was not made in {place}: {error.name} is not installed",
            "rlhf dashboard",
            "pip install 'rlhf-pipeline[dashboard]'",
        ) from error
    try:
        view = workspaces.Workspace(
            entity=settings.entity or str(wandb.Api().default_entity),
            project=settings.project,
            name=f"rlhf: {request.config.name}",
            sections=[
                workspaces.Section(name=name, is_open=True, panels=[reports.LinePlot(x=x, y=[y]) for x, y in panels])
                for name, panels in LAYOUT.items()
            ],
        )
        view.save()
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise TryAgainError(
            f"this view was not made in {place}: {why}", "Weights & Biases", "see whether it can be reached, then again"
        ) from error
    request.out.print(view.url, soft_wrap=True, markup=False)
