"""`convert(source, target)`: a checkpoint to quantized MLX shards, in bounded memory, never half written.

Owns the steps and their order: what the source is, the plan, disk space, blocks through the converter, the check at the
end and the new name. Leaves each step to its own file.

    recipe.py   bits per matrix      plan.py     every output tensor, from headers alone
    sources.py  folders              hub_source.py  repositories, a shard ahead
    blocks.py   bytes to bytes       partial.py  the folder in the making, its journal
    files.py    config and record    card.py     README
    calibrate.py  bits measured for a size, GPTQ
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions import blocks, card, files, hub, q4_0
from mlx_gemma4.conversions.calibrate import Budget, Calibration, budget, calibrated, folder_of
from mlx_gemma4.conversions.calibrate import request as calibration_request
from mlx_gemma4.conversions.compensate import Overlay
from mlx_gemma4.conversions.hub_source import HubRepo, check_disk
from mlx_gemma4.conversions.partial import Partial, check_target, partial_of
from mlx_gemma4.conversions.plan import FLOATS, SHARD_BYTES, Plan, build
from mlx_gemma4.conversions.recipe import Packing, Recipe, select
from mlx_gemma4.conversions.scratch import Scratch
from mlx_gemma4.conversions.sources import Folder, Reader, Source
from mlx_gemma4.errors import UsageError, WeightsError
from mlx_gemma4.loading import locate

# What MLX may keep of freed buffers while a conversion runs.
_MLX_CACHE = 128 << 20
# Blocks read ahead of the one being packed.
_AHEAD = 2


@dataclass(frozen=True)
class Step:
    """How far a conversion is. Bytes are of the source, except in "verify" (of the result) and "download"."""

    # "download" (waiting for a shard), "lattice", "measure" and "compensate" (a calibration's parts), "convert",
    # "verify", "upload", "note"
    stage: str
    bytes_done: int = 0
    bytes_total: int = 0
    tensors_done: int = 0
    tensors_total: int = 0
    text: str = ""  # the tensor at work, or what a "note" has to say


Report = Callable[[Step], Any]


@dataclass(frozen=True)
class Prepared:
    """A conversion that is planned and not begun: what `--dry-run` shows. Close its source."""

    source: Source
    config: Gemma4Config
    recipe: Recipe
    plan: Plan
    options: dict[str, Any]
    scratch: Scratch | None = None  # what a calibration keeps until all is written
    budget: Budget | None = None  # of a calibration not begun: `plan` is then its largest result


@dataclass(frozen=True)
class Result:
    folder: Path
    file_bytes: int
    tensors: int
    bits_per_parameter: float
    q4_0_matrices: int = 0


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int | None = None,
    *,
    group_size: int | None = None,
    mode: str | None = None,
    recipe: str | Path | Recipe | None = None,
    dtype: str | None = None,
    text_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    force: bool = False,
    delete_source: bool = False,
    upload: str | None = None,
    target_bits: float | None = None,
    target_size: str | int | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    progress: Report | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Result:
    """Converts `source` into the new folder `target`; see `recipe.select` for bits, group_size, mode and recipe.

    source: a folder of safetensors in the Hub's or MLX's layout, a family name or a Hub repository, as for `load`.
    dtype: "bfloat16", "float16" or "float32" for what is not packed and for scales; None: as in the source.
    text_only: leaves out the towers. delete_source: removes shards from the Hub cache once converted, those only that
    this conversion downloaded. force: replaces the model folder `target` when the new one is complete.
    target_bits (per parameter), target_size ("14GB" or bytes): instead of a recipe; each matrix gets the bits that lose
    least on the text file `calibrate` (None: a built-in sample), and GPTQ packs the linear maps (`calibrate.py`).
    upload: a Hub repository to send the result to. progress: called with a `Step`, at most a few times per block; what
    it raises ends the conversion.

    A run that ended early, however it ended, is taken up by the next one with the same arguments at the tensor it
    stopped at, and gives the same bytes. Raises UsageError, ConfigError, WeightsError, ModelNotFoundError,
    DoesNotFitError, Gemma4Error.
    """
    target = Path(target).expanduser().absolute()
    report: Report = progress or (lambda step: None)
    check_target(target, force)
    if upload is not None:
        from mlx_gemma4.conversions.upload import check_name

        check_name(upload)
    wanted = calibration_request(target_bits, target_size, calibrate)
    prepared = prepare(
        source,
        bits,
        group_size=group_size,
        mode=mode,
        recipe=recipe,
        dtype=dtype,
        text_only=text_only,
        revision=revision,
        token=token,
        delete_source=delete_source,
        calibration=wanted,
        target=target,
        progress=report,
        shard_bytes=shard_bytes,
    )
    with _closing(prepared):
        _check_apart(prepared.source, target)
        result = _write(prepared, target, force, report)
        if prepared.scratch is not None:
            prepared.scratch.remove()
    if upload is not None:
        from mlx_gemma4.conversions.upload import send

        report(Step("upload", text=upload))
        send(target, upload, token=token)
    return result


def prepare(
    source: str | os.PathLike[str],
    bits: int | None = None,
    *,
    group_size: int | None = None,
    mode: str | None = None,
    recipe: str | Path | Recipe | None = None,
    dtype: str | None = None,
    text_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    delete_source: bool = False,
    calibration: Calibration | None = None,
    target: Path | None = None,
    progress: Report | None = None,
    shard_bytes: int = SHARD_BYTES,
    dry: bool = False,
) -> Prepared:
    """Everything up to the first byte of weights; arguments and errors as of `convert`.

    Recipe q4_0 reads the weights, to find the lattice; with `dry` it does not, and takes all matrices to lie on it.
    calibration: instead of a recipe; it reads the weights and keeps what it finds beside `target`. With `dry` it reads
    none, so that all that is known is the `budget`.
    """
    if calibration is not None and not (recipe is bits is group_size is mode is None):
        raise UsageError("a target size chooses the bits; leave out --recipe, --bits, --group-size and --mode")
    chosen = select(recipe, bits, group_size, mode)
    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"dtype {dtype!r} is not available; allowed: {', '.join(FLOATS)}")
    found: Source = _open(source, revision, token, delete_source)
    report: Report = progress or (lambda step: None)
    options = {k: v for k, v in {"dtype": dtype, "text_only": text_only, "group_size": group_size}.items() if v}
    scratch = None
    try:
        config = Gemma4Config.from_folder(found.folder)
        if isinstance(found, HubRepo):
            # These read it all before anything is written.
            found.whole = calibration is not None or chosen.q4_0
        if calibration is not None and dry:
            allowed = budget(calibration, found, config, dtype, text_only)
            named = Recipe(calibration.name, None, description="Bits per matrix are chosen by the calibration.")
            return Prepared(found, config, named, allowed.most, options, budget=allowed)
        if calibration is not None:
            assert target is not None
            _check_apart(found, target)
            found, chosen, scratch = calibrated(
                calibration,
                found,
                config,
                folder_of(target),
                dtype=dtype,
                text_only=text_only,
                progress=lambda stage, done, total, path: report(Step(stage, done, total, text=path)),
            )
        plan = build(
            found.headers,
            config,
            lambda path: chosen.choose(path, config.text),
            chosen.default,
            dtype=dtype,
            text_only=text_only,
            keep_packed=chosen.default is not None,
            shard_bytes=shard_bytes,
        )
        if chosen.q4_0:
            plan = _on_lattice(plan, found, report, dry)
    except BaseException:
        found.close()
        if scratch is not None:
            scratch.close()
        raise
    return Prepared(found, config, chosen, plan, options, scratch)


def _open(
    source: str | os.PathLike[str], revision: str | None, token: str | None, delete_source: bool
) -> Folder | HubRepo:
    found = locate(source, revision)
    if isinstance(found, Path):
        Gemma4Config.from_folder(found)  # what is no Gemma 4 should say so, before its weights are looked at
        return Folder(found)
    repo, at = found
    listed = hub.listing(repo, at, token=token)
    if listed is None:
        return Folder(hub.download(repo, at, token=token, progress=False), repo)
    return HubRepo(repo, listed, token, delete_source)


@contextmanager
def _closing(prepared: Prepared) -> Iterator[None]:
    try:
        yield
    finally:
        prepared.source.close()
        if prepared.scratch is not None:
            prepared.scratch.close()


def _hub(source: Source) -> HubRepo | None:
    """The repository behind a source."""
    base = source.base if isinstance(source, Overlay) else source
    return base if isinstance(base, HubRepo) else None


def _check_apart(source: Source, target: Path) -> None:
    ours, theirs = target.resolve(), source.folder.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise UsageError(f"{target} and the source lie in one another; choose a folder apart from {source.folder}")


def _write(prepared: Prepared, target: Path, force: bool, report: Report) -> Result:
    source, plan, recipe = prepared.source, prepared.plan, prepared.recipe
    # Packing may differ between MLX versions and devices; bytes of two kinds must not meet in one result.
    identity = [source.identity(), metadata.version("mlx"), str(mx.default_device()), prepared.options, recipe.name]
    existing = partial_of(target)
    had = sum(f.stat().st_blocks * 512 for f in existing.glob("*.safetensors")) if existing.is_dir() else 0
    check_disk(source, target, max(0, sum(plan.sizes) - had))
    partial = Partial(target, plan, plan.digest(identity))
    previous = mx.set_cache_limit(_MLX_CACHE)
    try:
        if partial.fresh:
            report(Step("note", text=partial.fresh))
        elif partial.done:
            text = f"going on with an interrupted conversion: {len(partial.done)} of {len(plan.items)} tensors are done"
            report(Step("note", text=text))
        if (repo := _hub(source)) is not None:
            repo.mine |= partial.fetched
        _convert_items(source, plan, partial, report)
        partial.flush()
        done = 0

        def verified(count: int) -> None:
            nonlocal done
            done += count
            report(Step("verify", done, plan.tensor_bytes))

        hashes = partial.verify(verified)
        _add_small_files(prepared, target, partial, hashes)
        partial.rename(force)
    finally:
        mx.set_cache_limit(previous)
        partial.close()
    parameters = files.parameters_of(plan)
    return Result(
        target,
        sum(plan.sizes),
        sum(len(item.outputs) for item in plan.items),
        plan.tensor_bytes * 8 / parameters,
        sum(item.q4_0 for item in plan.items),
    )


def _add_small_files(prepared: Prepared, target: Path, partial: Partial, hashes: dict[str, dict[str, Any]]) -> None:
    source, plan, config, recipe = prepared.source, prepared.plan, prepared.config, prepared.recipe
    text_only, dtype = prepared.options.get("text_only", False), prepared.options.get("dtype")
    small = files.companions(source.folder, text_only)
    small["config.json"] = files.to_json(files.config_of(config, plan, dtype, text_only))
    small[files.INDEX] = files.to_json(files.index_of(plan))
    hashes |= {name: files.hashed(content) for name, content in small.items()}
    record = files.record_of(source, plan, recipe, prepared.options, hashes)
    small[files.RECORD] = files.to_json(record)
    small[card.README] = card.card(source, plan, config, recipe, target.name)
    for name, content in small.items():
        partial.add(name, content)


def _convert_items(source: Source, plan: Plan, partial: Partial, report: Report) -> None:
    todo = [i for i in plan.order if i not in partial.done]
    done_bytes = plan.source_bytes - sum(plan.items[i].source_bytes for i in todo)
    total, count = plan.source_bytes, len(plan.items)
    # The item after which a file of the source is not needed any more.
    last = {file: i for i in todo for file, _ in plan.items[i].sources}
    if (repo := _hub(source)) is not None:
        repo.on_fetched = partial.note_fetched
        repo.progress = lambda done, size: report(Step("download", done, size, count - len(todo), count))
        for file in repo.mine - set(last):
            repo.release(file)
    reader = Reader(source)
    try:
        report(Step("convert", done_bytes, total, count - len(todo), count))
        source.start(dict.fromkeys(file for i in todo for file, _ in plan.items[i].sources))
        writer, at = None, -1
        for index, raw in _ahead(lambda: _blocks(todo, plan, reader), source):
            if index != at:
                writer, at = partial.writer(index), index
            assert writer is not None
            try:
                writer.write(blocks.convert(raw))
            except ValueError as e:
                raise WeightsError(f"tensor {plan.items[index].name} cannot be packed: {e}") from None
            done_bytes += raw.nbytes
            item = plan.items[index]
            if raw.end == item.rows:
                writer.finish()
                for file in {file for file, _ in item.sources if last[file] == index}:
                    reader.close(file)
                    source.release(file)
            report(Step("convert", done_bytes, total, len(partial.done), count, item.name))
    finally:
        reader.close()


def _blocks(indices: list[int], plan: Plan, reader: Reader) -> Iterator[tuple[int, blocks.Raw]]:
    """The row blocks of these items in turn, read and checked."""
    for index in indices:
        item = plan.items[index]
        for begin, end in blocks.ranges(item):
            spans = blocks.spans(item, begin, end)
            parts = tuple(reader.read(*at, part) for at, part in zip(item.sources, spans, strict=True))
            raw = blocks.Raw(item, begin, end, parts)
            blocks.check_finite(raw)
            yield index, raw


def _ahead(make: Callable[[], Iterator[Any]], source: Source) -> Iterator[Any]:
    """What `make()` yields, computed on another thread a little in advance; its errors come out here."""
    ready: queue.Queue[Any] = queue.Queue(_AHEAD)
    stop, end = threading.Event(), object()

    def put(value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for value in make():
                if not put(value):
                    return
            put(end)
        except BaseException as e:
            put(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    finished = False
    try:
        while (value := ready.get()) is not end:
            if isinstance(value, BaseException):
                finished = True
                raise value
            yield value
        finished = True
    finally:
        stop.set()
        if not finished:
            source.close()  # it may be waiting for a download
        thread.join()


def _on_lattice(plan: Plan, source: Source, report: Report, dry: bool) -> Plan:
    """The plan with every matrix that lies on the Q4_0 lattice mapped exactly. Raises UsageError if none does."""
    exact = Packing(q4_0.GROUP, 4)
    candidates = [
        i
        for i in plan.order
        if (item := plan.items[i]).packing is not None and item.stored is None and item.columns % q4_0.GROUP == 0
    ]
    items = list(plan.items)
    on, off = (list(candidates), []) if dry else _test_lattice(candidates, plan, source, report)
    for i in on:
        items[i] = replace(items[i], packing=exact, q4_0=True)
    for i, item in enumerate(items):
        if item.stored == exact:
            items[i] = replace(item, packing=exact)  # converted so before
    if not any(item.packing == exact for item in items):
        raise UsageError(
            f"no matrix of {source.name} lies on the Q4_0 lattice, so there is nothing to keep; use --recipe 4bit"
        )
    if off:
        some = ", ".join(items[i].path for i in off[:3]) + (", ..." if len(off) > 3 else "")
        text = f"{len(on)} of {len(candidates)} matrices lie on the Q4_0 lattice; these do not and get 8 bits: {some}"
        report(Step("note", text=text))
    elif on:
        report(Step("note", text=f"all {len(on)} matrices are taken to lie on the Q4_0 lattice" if dry else _ALL_ON))
    return replace(plan, items=tuple(items), default=exact)


_ALL_ON = "every matrix lies on the Q4_0 lattice; all values are kept"


def _test_lattice(candidates: list[int], plan: Plan, source: Source, report: Report) -> tuple[list[int], list[int]]:
    """Which items lie on the lattice and which do not. A matrix is left at its first block that does not."""
    on, off, reader, done = [], [], Reader(source), 0
    total = sum(plan.items[i].source_bytes for i in candidates)
    try:
        source.start(dict.fromkeys(file for i in candidates for file, _ in plan.items[i].sources))
        for n, index in enumerate(candidates):
            item, fits = plan.items[index], True
            for _, raw in _blocks([index], plan, reader):
                at = done + item.source_bytes * raw.begin // item.rows
                report(Step("lattice", at, total, n, len(candidates)))
                if q4_0.scales(blocks.plain(raw)) is None:
                    fits = False
                    break
            done += item.source_bytes
            (on if fits else off).append(index)
    finally:
        reader.close()
    return on, off
