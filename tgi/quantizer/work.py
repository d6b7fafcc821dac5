"""One forward over the calibration text, in which each matrix is quantized when its turn comes: it sees what those
before it, quantized already, have made of the text. A layer is written when the next one begins."""

import importlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tgi.core.errors import StartupError
from tgi.core.job import Job
from tgi.models.config import DecoderConfig
from tgi.models.registry import ARCHITECTURES, PagedModel
from tgi.parallel import Group
from tgi.quantization.base import LinearMethod
from tgi.quantizer import awq
from tgi.quantizer.calibration import Whole
from tgi.quantizer.folds import Fold, NormFold, ProductFold, folds, layer_name
from tgi.quantizer.methods import Awq, method
from tgi.quantizer.output import Output
from tgi.quantizer.sites import Site, Sites, Source

log = logging.getLogger(__name__)


class Work:
    """A model, and what has been made of it."""

    def __init__(
        self,
        job: Job,
        config: DecoderConfig,
        source: Source,
        output: Output,
        dtype: torch.dtype | None,
    ) -> None:
        """``dtype``: of matrices that stay as they are, where they are stored wider. Raises StartupError if sizes of
        others don't allow what the job says."""
        self._config = config
        self._source = source
        self._output = output
        self._dtype = dtype
        row = ARCHITECTURES[config.shape.architecture]
        model_class = getattr(importlib.import_module(row.module), row.name)
        self._device = torch.device(job.device)
        sites = Sites(
            tensors=source,
            dtype=torch.float32,
            device=self._device,
            group=Group(),
            quantize=job.method,
            ready=self._ready,
        )
        # The head is never asked: as one by itself it is not even read.
        alone = replace(config, shape=replace(config.shape, tied=False))
        self._model: PagedModel = model_class(alone, sites, job.sequence_length)
        names = [f"{layer_name(config, layer)}." for layer in range(config.shape.layers)]
        self._layers = [[site for site in sites.found if site.name.startswith(name)] for name in names]
        self._layer_of = {site: layer for layer, own in enumerate(self._layers) for site in own}
        wanted = [piece for site in self._layer_of if not site.plain for piece in site.pieces]
        self._method = method(job, {piece.name: piece.shape[1] for piece in wanted})
        self._plain: dict[str, None] = {
            piece.name: None for site in self._layer_of if site.plain for piece in site.pieces
        }
        """Modules of layers that stay as they are."""
        for piece in wanted:
            if reason := self._method.declines(*piece.shape):
                log.warning("%s stays as it is: %s", piece.name, reason)
                self._plain[piece.name] = None
        if isinstance(self._method, Awq):
            _tell_unscaled(config, self._layers)
        self.quantization = self._method.config([*self._plain, config.head_name])
        """What config.json will say."""
        self.total = sum(site.bytes for site in self._layer_of)
        """What there is to do, as ``done`` counts."""
        self.done = sum(site.bytes for site, layer in self._layer_of.items() if layer < output.done)
        """Bytes of matrices, in float32."""
        self._progress: Callable[[int], None] = lambda done: None
        self._sequences = 0, 0
        """That are read: how many, and tokens of each."""
        self._begin()

    def run(self, sequences: torch.Tensor | None, progress: Callable[[int], None]) -> None:
        """Read int64 [samples, length], if the method reads, and write all shards. ``progress`` gets ``done``."""
        self._progress = progress
        if sequences is not None and self._layer < len(self._layers):
            self._sequences = samples, length = sequences.shape[0], sequences.shape[1]
            ids = sequences.flatten().to(self._device)
            positions = torch.arange(length, device=self._device).repeat(samples)
            attend = Whole(self._model.specs, samples, length, self._device)
            self._model.forward(ids, positions, attend)
        while self._layer < len(self._layers):
            self._finish()
        self._output.write(len(self._layers), self._rest(), self.quantization)

    def _begin(self) -> None:
        """The turn is the layer's behind the last that was written."""
        self._layer = self._output.done
        self._left = dict.fromkeys(self._layers[self._layer]) if self._layer < len(self._layers) else {}
        """Sites whose turn is still to come."""
        self._made: dict[str, Any] = {}
        """What the method made of matrices, by module."""
        self._changed: dict[str, torch.Tensor] = {}
        """By name of tensor."""
        self._scales: dict[Fold, torch.Tensor] = {}
        self._folds: dict[Site, Fold] = {}
        if isinstance(self._method, Awq):
            self._folds = dict(folds(self._config, self._layer, list(self._left)))

    def _ready(self, site: Site, x: torch.Tensor) -> LinearMethod:
        layer = self._layer_of.get(site, -1)
        while self._layer < layer:
            self._finish()
        if layer < self._layer:
            return site.method([site.weight(number) for number in range(len(site.pieces))])
        return site.method(self._quantized(site, x))

    def _quantized(self, site: Site, x: torch.Tensor | None) -> list[torch.Tensor]:
        """What the matrices of a site become."""
        scale = self._scale(site, x)
        seen = None
        if x is not None and not site.plain:
            seen = self._observed(x if scale is None else x / scale)
        found = []
        for number, piece in enumerate(site.pieces):
            values = site.weight(number) if scale is None else site.weight(number) * scale
            if piece.name not in self._plain:
                try:
                    self._made[piece.name] = made = self._method.quantize(values, seen)
                except ArithmeticError as error:
                    raise StartupError(f"{piece.name} can't be quantized: {error}") from None
                values = made.values
            elif scale is not None:
                self._changed[f"{piece.name}.weight"] = values.T if piece.transposed else values
            found.append(values if scale is None else values / scale)
        del self._left[site]
        self.done += site.bytes
        self._progress(self.done)
        return found

    def _observed(self, x: torch.Tensor) -> Any:
        samples, length = self._sequences
        return self._method.observe(x, length if len(x) == samples * length else None)  # experts have some tokens

    def _finish(self) -> None:
        """Write the layer, and go on to the next."""
        for site in list(self._left):
            if self._method.reads:
                log.warning("%s is rounded to the nearest: no token of the text came to it", site.name)
            self._quantized(site, None)
        prefix = f"{layer_name(self._config, self._layer)}."
        tensors: dict[str, torch.Tensor] = {}
        for name in self._source.taken:
            module = name.removesuffix(".weight")
            if module in self._made and module != name:
                parts = self._method.tensors(self._made[module])
                tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            elif name.startswith(prefix):
                tensors[name] = self._kept(name)
        self._output.write(self._layer, tensors, self.quantization)
        self._begin()

    def _rest(self) -> dict[str, torch.Tensor]:
        """What is in no layer."""
        prefixes = tuple(f"{layer_name(self._config, layer)}." for layer in range(len(self._layers)))
        return {name: self._kept(name) for name in self._source.taken if not name.startswith(prefixes)}

    def _kept(self, name: str) -> torch.Tensor:
        """A tensor that isn't quantized."""
        stored = self._source.taken[name][:]
        tensor = self._changed.get(name, stored).to(stored.dtype)
        wide = self._dtype is not None and tensor.dim() > 1 and tensor.itemsize > self._dtype.itemsize
        return tensor.to(self._dtype) if wide else tensor

    def _scale(self, site: Site, x: torch.Tensor | None) -> torch.Tensor | None:
        """What the inputs of a site are divided by, which everything else that takes part in it is told now."""
        fold = self._folds.get(site)
        if fold is None:
            return None
        if fold not in self._scales and x is not None:
            assert isinstance(self._method, Awq)
            weights = (
                taker.weight(number)
                for taker in fold.takers
                for number, piece in enumerate(taker.pieces)
                if piece.name not in self._plain
            )
            activity = self._observed(x)
            if isinstance(fold, NormFold):
                self._scales[fold] = self._into_norm(fold, awq.search(activity, weights))
            else:
                self._scales[fold] = scale = awq.search(activity, weights, fold.outputs.to(self._device))
                self._into_product(fold, scale)
        return self._scales.get(fold)

    def _into_norm(self, fold: NormFold, scale: torch.Tensor) -> torch.Tensor:
        """Returns the scale that the norm as it is stored really has."""
        name = f"{fold.norm}.weight"
        stored = self._source.taken[name][:]
        weight = stored.to(scale) + fold.offset
        self._changed[name] = changed = (weight / scale - fold.offset).to(stored.dtype)
        real = weight / (changed.to(scale) + fold.offset)
        scale = torch.where((real > 0) & real.isfinite(), real, scale)
        if (bias := self._source.taken.get(f"{fold.norm}.bias")) is not None:
            self._changed[f"{fold.norm}.bias"] = bias[:].to(scale) / scale
        return scale

    def _into_product(self, fold: ProductFold, scale: torch.Tensor) -> None:
        numbers, rows = fold.source.places()
        for number, piece in enumerate(fold.source.pieces):
            own = numbers[fold.outputs] == number
            divisors = torch.ones(piece.shape[0], device=self._device)
            divisors[rows[fold.outputs[own]].to(self._device)] = scale[own.to(self._device)]
            made = self._made.get(piece.name)
            if made is not None:
                made.divide(divisors)
            else:
                columns = divisors if piece.transposed else divisors[:, None]
                self._divide(f"{piece.name}.weight", columns)
            if f"{piece.name}.bias" in self._source.taken:
                self._divide(f"{piece.name}.bias", divisors)

    def _divide(self, name: str, divisors: torch.Tensor) -> None:
        tensor = self._changed.get(name)
        self._changed[name] = (self._source.taken[name][:] if tensor is None else tensor).to(divisors) / divisors


def _tell_unscaled(config: DecoderConfig, layers: Sequence[Sequence[Site]]) -> None:
    """Log what AWQ can't do, once for all layers that are alike."""
    scaled = {site for layer, sites in enumerate(layers) for site in folds(config, layer, sites)}
    others = [site.name for sites in layers for site in sites if not site.plain and site not in scaled]
    for name in dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in others):
        log.warning("%s: its inputs can't be scaled, for nothing before it can take the scales", name)
