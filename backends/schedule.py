"""Schedules for the loop nests that Relax generates, so that none of them runs at TVM's unscheduled default."""

from __future__ import annotations

from collections.abc import Collection

import tvm
from tvm import tirx

from rescompile.backends.kernels import schedule_default


def schedule_generated(kernels: Collection[str]) -> tvm.transform.Pass:
    """Schedule every function of a module for a processor, `kernels` excepted: they are finished."""

    @tvm.transform.module_pass(opt_level=0, name="ScheduleGenerated")  # type: ignore[untyped-decorator]
    def run(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        for variable, function in list(module.functions.items()):
            if isinstance(function, tirx.PrimFunc) and variable.name_hint not in kernels:
                module.update_func(variable, schedule_default(function))
        return module

    return run
