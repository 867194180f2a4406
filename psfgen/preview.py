"""What a render would do, without doing it."""

from __future__ import annotations

from typing import Any

from psfgen.block import cut_block
from psfgen.config import RenderConfig
from psfgen.engines import engine_class
from psfgen.executors import executor, slurm
from psfgen.plan import Plan, share
from psfgen.render import prepare
from psfgen.show import of_diffraction, span
from psfgen.specimens import Specimens
from psfgen.store import Store
from psfgen.store.open import format_of, store_class


def preview(job: RenderConfig, shard: str | None, *, overwrite: bool) -> tuple[dict[str, Any], str]:
    """The job with nothing left open, as plain data and as text.

    Raises what `render` would raise before it writes anything.
    """
    engine_class(job.engine), executor(job.executor), store_class(format_of(job.out, job.format))
    lens, plan, _ = prepare(job)
    mine = share(plan.blocks, shard)
    cut_block(Specimens(lens, plan).engine(0), plan, cores=1)
    effort = f"{plan.config.spp} rays a kernel" if plan.config.spp else f"noise at most {plan.config.tolerance:g}"
    done = _done(plan, overwrite=overwrite)
    document: dict[str, Any] = {
        "config": plan.config.model_dump(),
        "plan_sha256": plan.sha256,
        "kernels": len(mine) * plan.kernels_per_block,
        "blocks": len(mine),
        "blocks_done": None if done is None else len(done.intersection(mine)),
        "bytes": plan.nbytes,
        "memory_bytes": plan.config.memory_mib * 2**20,
        "paths": {"store": plan.config.out},
    }
    where = f"would be rendered into {plan.config.out}"
    if done is not None and overwrite:
        where += ", which exists and would be replaced"
    elif done is not None:
        where += f", where {document['blocks_done']} are done"
    text = (
        f"lens {lens.name}: EFL {lens.efl_mm:.3f} mm, F/{lens.fnum:.2f}\n"
        f"depth {span(plan.coords['depth'])} mm, focus {span(plan.coords['focus'])} mm, "
        f"wavelength {span(plan.coords['wavelength'])} um\n"
        f"field x {span(plan.coords['field_x'])}, y {span(plan.coords['field_y'])} half sensor sides\n"
        f"{plan.config.kernel_px} x {plan.config.kernel_px} samples of {plan.config.pitch_um:g} um, "
        f"{effort}\n"
        f"engine {plan.config.engine}{of_diffraction(plan.config.model_dump())}, tracer {plan.config.tracer}\n"
        f"the store holds {plan.nbytes / 2**20:.0f} MiB before compression, "
        f"rendering takes at most {plan.config.memory_mib} MiB of memory above the imports\n"
        f"{document['kernels']} kernels in {len(mine)} {'block' if len(mine) == 1 else 'blocks'} {where}"
    )
    if job.executor == "slurm":
        document["scripts"] = slurm.preview(plan, shard)
        text += "".join(f"\n\n--- {name}\n{script}" for name, script in document["scripts"].items()).rstrip()
    return document, text


def _done(plan: Plan, *, overwrite: bool) -> set[int] | None:
    """The blocks that the store already holds; None where there is no store."""
    out = plan.config.out
    kind = store_class(format_of(out, plan.config.format))
    if not kind.is_store(out):
        return None
    if overwrite:
        return set()
    store: Store = kind(out)
    plan.require_same(store.attrs, out)
    return set(plan.blocks).difference(store.missing())
