"""A circuit over a region graph as an ``nn.Module``: evaluation, queries, sampling and EM."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._files import SafetensorsFile, parse_json
from lora_ext.circuits import checks
from lora_ext.circuits._execution import Evaluate, Execution, Weights
from lora_ext.circuits.layered import FIRST_LEAF, MAX_BLOCK, compile_graph
from lora_ext.circuits.leaves import External, Gaussian, Indicator, Leaf
from lora_ext.circuits.region_graph import RegionGraph
from lora_ext.reference.circuit import draw
from lora_ext.reference.circuit_sum import log_weights

_METADATA = "lora_ext.circuit"
_MAX_LOADED_UNITS = 1 << 24  # leaf, sum and product units: a small file may describe many


def _signed(x: Tensor) -> Tensor:
    """Bytes as numbers among which -1 can stand."""
    return x.long() if x.dtype == torch.uint8 else x


class Flows(NamedTuple):
    """Expected use of every unit and weight, given the data.

    Attributes:
        log_prob: ``(B,)``.
        units: ``(B, U)``, the probability that a unit is on the path of a sample, given the row;
            columns as ``Circuit.columns`` gives them.
        weights: ``(num_weights,)``, summed over rows, in the order of ``Circuit.weights``.
    """

    log_prob: Tensor
    units: Tensor
    weights: Tensor


class MapResult(NamedTuple):
    """The best tree of the circuit.

    Attributes:
        x: ``(B, n)`` assignment, evidence kept.
        value: ``(B,)`` log-probability of the assignment together with all latents.
        exact: whether ``x`` is also known to maximise ``log_prob(x)``: True only if the circuit is
            deterministic; otherwise this is max-product, an approximation of that.
    """

    x: Tensor
    value: Tensor
    exact: bool


class Report(NamedTuple):
    """What :meth:`Circuit.check` finds."""

    smooth: bool
    decomposable: bool
    structured_decomposable: bool
    deterministic: checks.Truth
    normalisation_error: float


class Circuit(nn.Module):
    """A probabilistic circuit with parameters of its own, shared by all rows of data.

    Data ``x (B, n)``: integer, where -1 marginalises a variable in its row, or floating, where NaN
    does. Impossible data has log-probability ``-inf``, gradient zero and no NaN.

    Args:
        graph: the structure.
        norm: ``"logits"``: weights are log-softmaxed over each sum; ``"none"``: log-weights as they
            are, and :meth:`log_partition` is not zero.
        block: largest tile of the layered form; no result depends on it.
        precision: of ``log_prob``, as ``ops.log_einsum_exp`` takes it; may be set later.

    Attributes:
        weights: all log-weights, flat; :meth:`region_weights` views those of a region.
        leaves: per family of inputs, its table of parameters.

    Raises:
        PCStructureError: if the graph is not smooth and decomposable; only evaluation of complete
            data would mean anything.
    """

    def __init__(
        self,
        graph: RegionGraph,
        norm: str = "logits",
        block: int = MAX_BLOCK,
        precision: str = "fp32",
    ):
        super().__init__()
        if norm not in ("logits", "none"):
            raise ValueError(f"Circuit: norm must be 'logits' or 'none', got {norm!r}")
        checks.require(graph, "Circuit")
        self.graph, self.norm, self.precision = graph, norm, precision
        self.layered = compile_graph(graph, block)
        roots = [c for r in graph.roots for c in self.columns(r)]
        self._execution = Execution(self.layered, roots)
        self.weights = nn.Parameter(torch.randn(self.layered.num_weights))
        self.leaves = nn.ModuleList()
        for leaf, _, _, rows in self.layered.families:
            table = {} if isinstance(leaf, Indicator) else leaf.table(rows)
            self.leaves.append(nn.ParameterDict({k: nn.Parameter(t) for k, t in table.items()}))
        # Of each family: leaf units that see one variable and have consecutive rows, and variables.
        self._blocks: list[int] = []
        self._names: list[list[int]] = []
        for family in range(len(self.layered.families)):
            members = [r for i, r in enumerate(graph.regions) if self._family(i) == family]
            self._blocks.append(math.gcd(*(r.units for r in members)))
            self._names.append(
                checks.variables(functools.reduce(lambda s, r: s | r.variables, members, 0))
            )
        self.register_buffer("_var", self.layered.inputs.var.long(), persistent=False)
        self.register_buffer("_row", self.layered.inputs.row.long(), persistent=False)
        self.register_buffer("_indicators", self.layered.indicator_values.long(), persistent=False)
        self._var: Tensor
        self._row: Tensor
        self._indicators: Tensor

    # --- where things lie -------------------------------------------------------------------------
    @property
    def num_variables(self) -> int:
        """Columns of the data."""
        return self.graph.num_variables

    def columns(self, region: int) -> range:
        """Columns of ``Flows.units`` that belong to a region."""
        first = self.layered.first_unit[region]
        return range(first, first + self.graph.regions[region].units)

    def region_weights(self, region: int) -> Tensor:
        """Log-weights of a sum region before normalisation, a view ``(units, products)``."""
        inner = self.graph.regions[region]
        if not inner.partitions:
            raise ValueError(f"region_weights: {self.graph.label(region)} is an input")
        first, shape = (
            self.layered.weight_off[region],
            (inner.units, self.graph.num_products(inner)),
        )
        return self.weights[first : first + shape[0] * shape[1]].view(shape)

    def region_leaves(self, region: int) -> dict[str, Tensor]:
        """Parameters of an input region, views with a row per unit of each variable in turn."""
        node = self.graph.regions[region]
        if node.leaf is None:
            raise ValueError(f"region_leaves: {self.graph.label(region)} is no input")
        unit = self._first_leaf(region)
        row, family = int(self._row[unit]), int(self.layered.inputs.dist[unit])
        rows = slice(row, row + node.units * node.variables.bit_count())
        return {k: t[rows] for k, t in self._table(family).items()}

    def _first_leaf(self, region: int) -> int:
        """The first leaf unit of an input region, counted from the first of all."""
        unit, factors = self.layered.first_unit[region], self.layered.factors
        begin = FIRST_LEAF + len(self.layered.inputs.var)
        if unit >= begin:
            unit = int(factors.child_idx[factors.child_ptr[unit - begin]])
        return unit - FIRST_LEAF

    def _family(self, region: int) -> int:
        """The family of an input region, -1 for a sum."""
        if self.graph.regions[region].leaf is None:
            return -1
        return int(self.layered.inputs.dist[self._first_leaf(region)])

    def _table(self, family: int) -> dict[str, Tensor]:
        table = self.leaves[family]
        assert isinstance(table, nn.ParameterDict)
        return dict(table.items())

    def _families(self) -> Iterable[tuple[Leaf, dict[str, Tensor], slice]]:
        for family, (leaf, begin, end, _) in enumerate(self.layered.families):
            yield leaf, self._table(family), slice(begin - FIRST_LEAF, end - FIRST_LEAF)

    # --- evaluation -------------------------------------------------------------------------------
    def _check_data(self, name: str, x: Tensor) -> Tensor:
        """Whether an entry is missing; raises on shape, device and values out of range."""
        n = self.num_variables
        if x.dim() != 2 or x.shape[1] != n:
            raise ValueError(f"{name}: x must have shape (B, {n}), got {tuple(x.shape)}")
        if x.device != self.weights.device:
            raise ValueError(f"{name}: x must be on {self.weights.device}, got {x.device}")
        missing = x.isnan() if x.is_floating_point() else x < 0
        for (leaf, *_), names in zip(self.layered.families, self._names, strict=True):
            size = leaf.num_values()
            if size is None:
                if isinstance(leaf, Gaussian) and (infinite := x[:, names].isinf()).any():
                    row, column = infinite.nonzero()[0].tolist()
                    raise ValueError(
                        f"{name}: variable {names[column]} takes finite numbers, got "
                        f"{x[row, names[column]].item()} in row {row}"
                    )
                continue
            known = _signed(x[:, names])
            wrong = (known < (0 if x.is_floating_point() else -1)) | (known >= size)
            if x.is_floating_point():
                wrong |= (known != known.floor()) & ~missing[:, names]
            if wrong.any():
                row, column = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"{name}: variable {names[column]} takes values 0 .. {size - 1}, got "
                    f"{known[row, column].item()} in row {row}"
                )
        return missing

    def _leaf_values(self, name: str, x: Tensor, external: Tensor | None) -> Tensor:
        """Log-values of the leaf units, ``(B, N)``; 0 where a variable is missing."""
        missing = self._check_data(name, x)
        complete = not missing.any()
        filled = x if complete else torch.where(missing, 0, x)
        dtype = self.weights.dtype
        parts: list[Tensor] = []
        for (leaf, table, span), block in zip(self._families(), self._blocks, strict=True):
            var = self._var[span][::block]
            if isinstance(leaf, External):
                units = len(var) * block
                if external is None or external.shape != (len(x), units):
                    found = None if external is None else tuple(external.shape)
                    raise ValueError(
                        f"{name}: external must have shape {(len(x), units)}, got {found}"
                    )
                e = external.to(dtype).unflatten(1, (-1, block))
            elif isinstance(leaf, Indicator):
                hit = filled[:, var, None] == self._indicators[span].view(-1, block)
                e = torch.where(hit, 0.0, -torch.inf).to(dtype)
            else:
                e = leaf.log_prob(table, self._row[span], filled[:, var])
            if not complete and not isinstance(leaf, External):
                e = torch.where(missing[:, var, None], 0, e)
            parts.append(e.flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _refuse_external(self, name: str) -> None:
        for leaf, _, span in self._families():
            if isinstance(leaf, External):
                raise ValueError(f"{name}: variable {int(self._var[span][0])} is external")

    def _run(self) -> Execution:
        self._execution.to(self.weights.device)
        return self._execution

    def _weights(self) -> Weights:
        return Weights(self.weights.detach(), self.norm)

    def log_prob(self, x: Tensor, external: Tensor | None = None) -> Tensor:
        """``log p`` of the variables that are given, the others summed out.

        Differentiable once, in the parameters and in ``external``.

        Args:
            x: ``(B, n)``, -1 or NaN where a variable is marginalised.
            external: ``(B, N)`` log-values of the external leaf units, if there are any.

        Returns:
            ``(B,)`` in the dtype of the parameters; ``(B, R)`` if there are R root units.

        Raises:
            ValueError: on a wrong shape, device or value, naming the variable.
        """
        leaf = self._leaf_values("log_prob", x, external)
        out: Any = Evaluate.apply(leaf, self.weights, self._run(), self.norm, self.precision)
        return out[:, 0] if out.shape[1] == 1 else out

    forward = log_prob

    @torch.no_grad()
    def log_partition(self) -> Tensor:
        """Log of the sum over all assignments; 0 for normalised circuits."""
        self._refuse_external("log_partition")
        return self.log_prob(self._nothing(1))[0]

    def _nothing(self, rows: int) -> Tensor:
        return torch.full((rows, self.num_variables), -1, device=self.weights.device)

    def marginal(self, x: Tensor, keep: Iterable[int], external: Tensor | None = None) -> Tensor:
        """``log p(x_keep)``: the other variables of ``x`` are not looked at."""
        variables = list(keep)
        if wrong := [v for v in variables if v not in range(self.num_variables)]:
            raise ValueError(
                f"marginal: keep must name variables 0 .. {self.num_variables - 1}, got {wrong[0]}"
            )
        kept = torch.zeros(self.num_variables, dtype=torch.bool, device=x.device)
        kept[variables] = True
        x = _signed(x)
        nothing = torch.nan if x.is_floating_point() else -1
        return self.log_prob(torch.where(kept, x, nothing), external)

    @torch.no_grad()
    def conditionals(self, x: Tensor) -> Tensor:
        """``log p(x_k | x_<k)`` in variable order, ``(B, n)``; ``-inf`` after an impossible prefix.

        The general graph costs n passes; ``ops.circuit_scan`` does cp, hmm and btree in one.
        """
        self._check_data("conditionals", x)
        x = _signed(x)
        before = self._root(self._nothing(1))
        out: list[Tensor] = []
        nothing = torch.nan if x.is_floating_point() else -1
        position = torch.arange(self.num_variables, device=x.device)
        for k in range(self.num_variables):
            prefix = self._root(torch.where(position <= k, x, nothing))
            possible = before > -torch.inf
            out.append(torch.where(possible, prefix - torch.where(possible, before, 0), before))
            before = prefix
        return torch.stack(out, 1)

    def _root(self, x: Tensor) -> Tensor:
        return self.log_prob(x).unflatten(0, (len(x), 1)).flatten(1)[:, 0]

    # --- top-down ---------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        evidence: Tensor | None = None,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Exact samples given evidence, the same for the same uniforms.

        Upward once with the evidence, then down from the first root unit: every sum on the way
        draws a term in proportion to weight times value, every leaf its value, by the rule of
        ``reference.circuit.draw``.

        Args:
            num_samples: S per row of evidence.
            evidence: ``(B, n)``, -1 or NaN where a value is to be drawn; None: one row of nothing.
            uniforms: ``(B, S, sum regions + n)`` in [0, 1): one per sum region in graph order, one
                per variable; None: drawn from ``generator``.
            generator: source of uniforms.

        Returns:
            ``(B, S, n)``: int64, or floating where evidence or a family is.

        Raises:
            ValueError: on wrong shapes, impossible evidence, or external variables to be drawn.
        """
        if evidence is None:
            evidence = self._nothing(1)
        missing = self._check_data("sample", evidence)
        inner = [i for i, r in enumerate(self.graph.regions) if r.partitions]
        shape = (len(evidence), num_samples, len(inner) + self.num_variables)
        device, dtype = self.weights.device, self.weights.dtype
        if uniforms is None:
            uniforms = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
        if uniforms.shape != shape:
            raise ValueError(
                f"sample: uniforms must have shape {shape}, got {tuple(uniforms.shape)}"
            )
        val = self._values("sample", evidence)
        impossible = (val[:, self._execution.roots[0]] == -torch.inf).nonzero()
        if len(impossible):
            raise ValueError(f"sample: the evidence of row {int(impossible[0])} is impossible")
        u = uniforms.flatten(0, 1)
        slot = torch.full((len(self.graph.regions),), -1, device=device)
        slot[inner] = torch.arange(len(inner), device=device)
        row = torch.arange(len(evidence), device=device).repeat_interleave(num_samples)

        def pick(terms: Tensor, m: Tensor, region: Tensor) -> Tensor:
            top = terms.amax(1, keepdim=True)
            return draw((terms - top).exp(), u[m, slot[region]])

        chosen = self._choose(val, row, pick)
        x = self._outcome(evidence)[row]

        def fill(leaf: Leaf, table: dict[str, Tensor], entry: tuple[Tensor, Tensor], rows: Tensor):
            m, v = entry
            return leaf.sample(table, rows, u[m, len(inner) + v].to(dtype))

        self._fill("sample", x, chosen, missing[row], fill)
        return x.unflatten(0, (len(evidence), num_samples))

    @torch.no_grad()
    def map(self, evidence: Tensor | None = None) -> MapResult:
        """The assignment and latents of largest joint probability: max-product, up and down.

        Ties go to the lowest index.

        Args:
            evidence: ``(B, n)``, -1 or NaN where a value is sought; None: one row of nothing.

        Raises:
            ValueError: on a wrong shape, or external variables that are sought.
        """
        evidence = self._nothing(1) if evidence is None else evidence
        missing = self._check_data("map", evidence)
        val = self._values("map", evidence, best=missing)
        row = torch.arange(len(evidence), device=evidence.device)
        chosen = self._choose(val, row, lambda terms, m, region: terms.max(1).indices)
        x = self._outcome(evidence)

        def fill(leaf: Leaf, table: dict[str, Tensor], entry: tuple[Tensor, Tensor], rows: Tensor):
            return leaf.mode(table, rows)[0]

        self._fill("map", x, chosen, missing, fill)
        exact = checks.is_deterministic(self.graph) is True
        return MapResult(x, val[:, self._execution.roots[0]], exact)

    def _values(self, name: str, x: Tensor, best: Tensor | None = None) -> Tensor:
        """All units; with ``best`` by max-product, where missing variables take their mode."""
        self._refuse_external(name)
        e = self._leaf_values(name, x, None)
        if best is None:
            return self._run().up(e, self._weights())
        for leaf, table, span in self._families():
            if not isinstance(leaf, Indicator):
                mode = leaf.mode(table, self._row[span])[1]
                e[:, span] = torch.where(best[:, self._var[span]], mode, e[:, span])
        return self._run().up(e, self._weights(), "max")

    def _choose(self, val: Tensor, row: Tensor, pick: Any) -> Tensor:
        execution = self._run()
        return execution.choose(val, self._weights(), row, execution.roots[0], pick)

    def _outcome(self, evidence: Tensor) -> Tensor:
        """A copy of the evidence that can hold what is drawn."""
        continuous = any(
            leaf.num_values() is None and not isinstance(leaf, Indicator)
            for leaf, _, _ in self._families()
        )
        if not continuous or evidence.is_floating_point():
            return evidence.clone()
        floats = evidence.to(self.weights.dtype)
        return torch.where(evidence < 0, torch.nan, floats)

    def _fill(self, name: str, x: Tensor, chosen: Tensor, missing: Tensor, value: Any) -> None:
        for leaf, table, span in self._families():
            inside = (chosen >= span.start + FIRST_LEAF) & (chosen < span.stop + FIRST_LEAF)
            m, v = (inside & missing).nonzero(as_tuple=True)
            unit = chosen[m, v] - FIRST_LEAF
            if isinstance(leaf, Indicator):
                x[m, v] = self._indicators[unit].to(x.dtype)
            elif len(m):
                x[m, v] = value(leaf, table, (m, v), self._row[unit]).to(x.dtype)

    # --- learning ---------------------------------------------------------------------------------
    @torch.no_grad()
    def flows(self, x: Tensor, external: Tensor | None = None) -> Flows:
        """Expected flows: the posterior probability of every unit, and of every weight's use.

        They are the derivatives of ``log p(x)`` in the log-values of units and in the normalised
        log-weights. Over the leaf units of one variable they sum to one. Impossible rows have none.
        """
        execution = self._run()
        normalised = Weights(self._log_weights(), "none")
        val = execution.up(self._leaf_values("flows", x, external), normalised)
        root = execution.roots[0]
        grad = torch.zeros_like(val)
        grad[:, root] = (val[:, root] > -torch.inf).to(val.dtype)
        units, _, weights = execution.down(grad, val, normalised)
        return Flows(val[:, root].clone(), units, weights)

    def _log_weights(self) -> Tensor:
        flat = torch.empty_like(self.weights)
        for stage in self._run().stages:
            stage.weights.put(flat, log_weights(stage.weights.gather(self.weights), self.norm))
        return flat

    @torch.no_grad()
    def em_step(
        self, x: Tensor, step: float = 1.0, pseudocount: float = 0.0, keep_zero: bool = False
    ) -> Tensor:
        """One step of expectation maximisation on a batch, in place.

        ``W' = (F + c / I) / (sum F + c)`` of every sum and likewise of every leaf, then
        ``W <- (1 - step) W + step W'``. Sums and leaves without flow stay as they are. With a full
        batch, ``step=1`` and no pseudocount the mean log-likelihood never falls.

        Args:
            x: ``(B, n)``; missing entries count for sums, not for leaves.
            step: in (0, 1].
            pseudocount: c, spread over the terms of a sum.
            keep_zero: terms of weight zero stay at zero.

        Returns:
            Mean log-likelihood of the batch before the step.

        Raises:
            ValueError: for unnormalised circuits, wrong data or a wrong step.
        """
        if self.norm != "logits":
            raise ValueError("em_step needs norm='logits', got a circuit with norm 'none'")
        if not 0 < step <= 1 or not 0 <= pseudocount < math.inf:
            raise ValueError(
                f"em_step: step must be in (0, 1] and pseudocount >= 0, got {step}, {pseudocount}"
            )
        if len(x) == 0:
            raise ValueError("em_step: x must have at least one row, got none")
        log_prob, units, weight_flows = self.flows(x)
        old_flat = self._log_weights()
        for stage in self._execution.stages:
            flow, old = stage.weights.gather(weight_flows), stage.weights.gather(old_flat)
            there = old > -torch.inf if keep_zero else stage.weights.present(old)
            flow = torch.where(there, flow, 0)
            total = flow.sum(-1, keepdim=True)
            terms = there.sum(-1, keepdim=True).clamp(min=1)
            new = (flow + there * (pseudocount / terms)) / (total + pseudocount)
            mixed = ((1 - step) * old.exp() + step * new).log()
            kept = stage.weights.gather(self.weights.data)
            stage.weights.put(self.weights.data, torch.where(total > 0, mixed, kept))
        missing = self._check_data("em_step", x)
        filled = torch.where(missing, 0, x).to(self.weights.dtype)
        for leaf, table, span in self._families():
            if isinstance(leaf, Indicator | External):
                continue
            var = self._var[span]
            flow = units[:, FIRST_LEAF:][:, span]
            flow = torch.where(missing[:, var], 0, flow)
            data = {k: t.data for k, t in table.items()}
            leaf.update(data, self._row[span], filled[:, var], flow, step, pseudocount)
        return log_prob.mean()

    # --- structure and files ----------------------------------------------------------------------
    @torch.no_grad()
    def check(self) -> Report:
        """Properties of the structure, and how far the worst row of weights is from sum one."""
        error = 0.0
        for stage in self._run().stages:
            w = log_weights(stage.weights.gather(self.weights), self.norm)
            error = max(error, float((w.exp().sum(-1) - 1).abs().max()))
        return Report(
            checks.is_smooth(self.graph),
            checks.is_decomposable(self.graph),
            checks.is_structured_decomposable(self.graph),
            checks.is_deterministic(self.graph),
            error,
        )

    def save(self, path: str | Path) -> None:
        """Write parameters and structure into one safetensors file."""
        from safetensors.torch import save_file  # not with lora_ext: only this needs it

        tensors = {k: t.detach().cpu().contiguous() for k, t in self.state_dict().items()}
        text = f'{{"norm": "{self.norm}", "graph": {self.graph.to_json()}}}'
        save_file(tensors, str(path), {_METADATA: text})

    @staticmethod
    def load(path: str | Path, block: int = MAX_BLOCK) -> Circuit:
        """Read a file of :meth:`save`, which is not trusted.

        Raises:
            ValueError: on anything unexpected, before memory is taken for it.
        """
        file = SafetensorsFile(Path(path))
        try:
            where = file.where
            data = parse_json(file.metadata.get(_METADATA, "null").encode(), where)
            if not isinstance(data, dict) or data.keys() != {"norm", "graph"}:
                raise ValueError(f"{where}: expected a circuit, found metadata {[*file.metadata]}")
            if data["norm"] not in ("logits", "none"):
                raise ValueError(
                    f"{where}: norm: expected logits or none, found {data['norm']!r:.80}"
                )
            graph = RegionGraph.from_json(data["graph"], where)
            units = sum(
                r.units * max(1, r.variables.bit_count()) + graph.num_products(r)
                for r in graph.regions
            )
            if units > _MAX_LOADED_UNITS:
                raise ValueError(
                    f"{where}: expected at most {_MAX_LOADED_UNITS} units, found {units}"
                )
            layered = compile_graph(graph, block)
            wanted: dict[str, tuple[int, ...]] = {"weights": (layered.num_weights,)}
            for i, (leaf, _, _, rows) in enumerate(layered.families):
                for k, t in ({} if isinstance(leaf, Indicator) else leaf.table(0)).items():
                    wanted[f"leaves.{i}.{k}"] = (rows, *t.shape[1:])
            dtypes = {info.dtype for info in file.infos.values()}
            found = {k: info.shape for k, info in file.infos.items()}
            if found != wanted or not dtypes <= {torch.float32, torch.float64} or len(dtypes) > 1:
                raise ValueError(
                    f"{where}: expected {wanted!r:.300} in float32 or float64, "
                    f"found {found!r:.300} in {dtypes}"
                )
            circuit = Circuit(graph, data["norm"], block).to(dtypes.pop())
            circuit.load_state_dict({k: file.read(k) for k in found})
            return circuit
        finally:
            file.close()

    def to_dot(self) -> str:
        """The region graph in Graphviz' language."""
        return self.graph.to_dot()
