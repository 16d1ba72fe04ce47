"""Settings under the names that they had in the last release, which this one still reads."""

import json

from rlhf.config.yaml_tree import Problem, Tree


def read_former_lora(tree: Tree, stage: str) -> None:
    """Put ``lora`` of a stage instance in the place of ``tuning``, and add a notice of what to write to the tree."""
    section = tree.values[stage]
    where = tree.place((stage, "lora"))
    if "tuning" in section:
        what = f"{stage} has both tuning, set at {tree.place((stage, 'tuning'))}, and lora, its former name"
        tree.problems.append(Problem(what, where, "keep tuning, and take lora out"))
        del section["lora"]
        return
    tree.rename((stage, "lora"), "tuning")
    if section["tuning"] is None:
        section["tuning"] = {"method": "full"}
    elif isinstance(section["tuning"], dict):
        section["tuning"] = {"method": "lora"} | section["tuning"]
    else:
        return  # the mistake is reported as one of tuning
    method, *rest = section["tuning"].items()
    block = ", ".join([f"method: {method[1]}", *(f"{name}: {json.dumps(value)}" for name, value in rest)])
    line = f"{stage}.tuning={{{block}}}" if where.startswith("override ") else f"tuning: {{{block}}}"
    tree.notices.append(
        f"{stage}.lora is now called {stage}.tuning, and the next release refuses the old name; write {line} ({where})"
    )
