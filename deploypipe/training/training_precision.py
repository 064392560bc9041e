"""The arithmetic of a training: bf16 only if the processor or GPU computes in it, because emulation is far slower."""

from dataclasses import replace
from typing import Literal, TypeAlias

import torch

from deploypipe.recipe import Finetune
from deploypipe.runtimes.this_machine import this_machine

Precision: TypeAlias = Literal["bf16", "fp32"]

_X86, _ARM = ("avx512_bf16", "amx_bf16"), ("bf16",)


def native_precision(accelerator: str = "auto") -> tuple[Precision, str]:
    """The precision that "auto" means on this machine, and the reason. accelerator: as in `ComputeDevice`."""
    if accelerator in ("auto", "cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", f"{name} has bf16") if has_it else ("fp32", f"{name} has no bf16")
    machine = this_machine()
    known = _X86 if machine.architecture == "x86_64" else _ARM
    present = [feature for feature in known if feature in machine.cpu_features]
    if not present:
        return "fp32", f"the processor has none of {', '.join(known)}, and emulated bf16 is several times slower"
    capability = torch.backends.cpu.get_cpu_capability()
    if known is _X86 and capability != "AVX512":
        return "fp32", f"the processor has {present[0]}, but torch is limited to {capability} (ATEN_CPU_CAPABILITY)"
    return "bf16", f"the processor has {', '.join(present)}"


def with_precision(settings: Finetune, accelerator: str = "auto") -> Finetune:
    """The settings with "auto" replaced by this machine's precision."""
    return replace(settings, precision=native_precision(accelerator)[0]) if settings.precision == "auto" else settings
