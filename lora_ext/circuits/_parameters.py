"""The parameters of a circuit: their layout and files, and the log-values of its leaves on data.

Queries, sampling and learning are built on this module.

Letters: ``B`` rows of data, ``n`` variables, ``N`` leaf units; ``M`` blocks of leaf units of a
family over ``d`` variables each.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import integer, require
from lora_ext._files import SafetensorsFile, parse_json
from lora_ext.reference import log_weights

from . import _structure
from ._leaves import External, Finite, Indicator, Leaf, Table, in_rows
from ._program import (
    FIRST_LEAF,
    Execution,
    Weights,
    compile_graph,
    compile_program,
    root_columns,
    rows_of_one_width,
)
from ._regions import variables
from .multivariate import MultivariateGaussian
from .region_graph import RegionGraph

_METADATA = "lora_ext.circuit"
_MAX_UNITS = 1 << 24  # limit of leaf, sum and product units, since a small file can describe many


def require_tensor(where: str, name: str, x: object) -> None:
    """Raise ValueError unless ``x`` is a tensor, because other data have no device."""
    remedy = f"{type(x).__module__}.{type(x).__name__}; convert it with torch.as_tensor"
    require(isinstance(x, Tensor), where, name, "a tensor", remedy)


def signed(x: Tensor) -> Tensor:
    """Return ``x`` in a dtype that can represent -1: uint8 is converted to int64."""
    return x.long() if x.dtype == torch.uint8 else x


class Parameters(nn.Module):
    """Base class of ``Circuit`` with the weights of the sums and the tables of the leaves."""

    def __init__(self, graph: RegionGraph, norm: str = "logits", precision: str = "fp32"):
        super().__init__()
        require(norm in ("logits", "none"), "Circuit", "norm", "'logits' or 'none'", repr(norm))
        _structure.check_tractable(graph, "Circuit")
        self.graph, self.norm, self.precision = graph, norm, precision
        self.layered = compile_graph(graph)
        program = compile_program(graph, self.layered)
        self._execution = Execution(program, root_columns(graph, self.layered))
        self._matrices = rows_of_one_width(program)
        self.weights = nn.Parameter(torch.randn(self.layered.num_weights))
        self.leaves = nn.ModuleList()
        # The leaf units of a family form blocks of one size. The units of a block have the same
        # variables and consecutive table rows. Each family stores the block size and the list of
        # its variables. A family over several variables also stores the variables of each block.
        self._blocks: list[int] = []
        self._names: list[list[int]] = []
        firsts = {i: columns[0] for i, columns in self.layered.first_leaves.items()}
        for family, (leaf, begin, end, rows, size) in enumerate(self.layered.families):
            table = _fresh_table(leaf, rows, size)
            self.leaves.append(nn.ParameterDict({k: nn.Parameter(t) for k, t in table.items()}))
            members = [graph.regions[i] for i, first in firsts.items() if begin <= first < end]
            scope = functools.reduce(lambda s, r: s | r.variables, members, 0)
            self._blocks.append(math.gcd(*(r.units for r in members)))
            self._names.append(variables(scope))
            if isinstance(leaf, MultivariateGaussian):
                blocks = [(r, r.units // self._blocks[-1]) for r in members]
                scopes = [variables(r.variables) for r, number in blocks for _ in range(number)]
                self.register_buffer(f"_scopes{family}", torch.tensor(scopes), persistent=False)
        self.register_buffer("_var", self.layered.inputs.var.long(), persistent=False)
        self.register_buffer("_row", self.layered.inputs.row.long(), persistent=False)
        self.register_buffer("_indicators", self.layered.indicator_values.long(), persistent=False)
        self._var: Tensor
        self._row: Tensor
        self._indicators: Tensor
        # For a single family on the CPU, `_looked_up` stores the variable of each block (None for
        # all variables in order), the first table row of each block, and the block size.
        self._places: tuple[Tensor | None, Tensor, int] | None = None

    def __repr__(self) -> str:
        total, sums = sum(p.numel() for p in self.parameters()), self.weights.numel()
        lines = [
            ", ".join(self.graph.counts()),
            f"{total} parameters ({sums} of sums, {total - sums} of leaves), {self.weights.dtype} "
            f"on {self.weights.device}",
            f"norm {self.norm!r}, precision {self.precision!r}, semirings 'sum' and, of map, 'max'",
        ]
        return f"{type(self).__name__}(\n  " + "\n  ".join(lines) + "\n)"

    # --- layout of the parameters -----------------------------------------------------------------
    @property
    def num_variables(self) -> int:
        """Number of variables, which is the number of columns of the data."""
        return self.graph.num_variables

    def columns(self, region: int) -> range:
        """Return the columns of a region in ``Flows.units``."""
        first = self.layered.first_unit[region]
        return range(first, first + self.graph.regions[region].units)

    def region_weights(self, region: int) -> Tensor:
        """Return the log-weights of a region of sums before normalisation.

        Returns:
            A view ``(units, products)`` of the parameters: one row per sum, one column per term.
        """
        inner, label = self.graph.regions[region], self.graph.label(region)
        found = f"{label}, an input"
        require(bool(inner.partitions), "region_weights", "region", "a region of sums", found)
        first = self.layered.weight_off[region]
        units, products = inner.units, self.graph.num_products(inner)
        return self.weights[first : first + units * products].view(units, products)

    def region_leaves(self, region: int) -> dict[str, Tensor]:
        """Return the parameters of an input region by name.

        Returns:
            Views with one row per variable and unit, sorted by variable. If the distributions of
            the family are over several variables, there is one row per unit.
        """
        node, label = self.graph.regions[region], self.graph.label(region)
        found = f"{label}, a region of sums"
        require(node.leaf is not None, "region_leaves", "region", "an input", found)
        unit = self.layered.first_leaves[region][0] - FIRST_LEAF
        row, family = int(self._row[unit]), int(self.layered.inputs.dist[unit])
        each = 1 if isinstance(node.leaf, MultivariateGaussian) else node.variables.bit_count()
        rows = slice(row, row + node.units * each)
        return {k: t[rows] for k, t in self._table(family).items()}

    def _table(self, family: int) -> dict[str, Tensor]:
        table = self.leaves[family]
        assert isinstance(table, nn.ParameterDict)
        return dict(table.items())

    def _families(self) -> Iterable[tuple[Leaf, dict[str, Tensor], slice]]:
        """Yield every family, its table, and the range of its leaf units."""
        for family, (leaf, begin, end, *_) in enumerate(self.layered.families):
            yield leaf, self._table(family), slice(begin - FIRST_LEAF, end - FIRST_LEAF)

    def _scopes(self, span: slice) -> Tensor:
        """Return the variables of each block of a family over several variables, ``(M, d)``.

        ``span`` is the range of the family's leaf units.
        """
        return self.get_buffer(f"_scopes{int(self.layered.inputs.dist[span.start])}")

    def _joint_data(self, span: slice, filled: Tensor, missing: Tensor) -> Tensor:
        """Gather the data of the d variables of each of the M blocks in ``span``, ``(B, M, d)``.

        ``filled (B, n)`` are the data. Entries where ``missing`` is True become NaN.
        """
        scopes = self._scopes(span)
        seen = filled[:, scopes].to(self.weights.dtype)
        return torch.where(missing[:, scopes], torch.nan, seen)

    # --- execution --------------------------------------------------------------------------------
    def _run(self) -> Execution:
        """Return the program on the device of the parameters."""
        self._execution.to(self.weights.device)
        return self._execution

    def _weights(self) -> Weights:
        return Weights(self.weights.detach(), self.norm)

    def _log_weights(self) -> Tensor:
        """Return the normalised log-weights in the order of ``weights``."""
        flat = torch.empty_like(self.weights)
        for w, out in zip(self._rows(self.weights), self._rows(flat), strict=True):
            out.copy_(log_weights(in_rows(w), self.norm)[0])
        return flat

    def _rows(self, flat: Tensor) -> list[Tensor]:
        """Return views ``(sums, terms)`` that cover ``flat``, which has the order of the weights.

        Neighbouring sums with the same number of terms are in one view, so there are few views.
        """
        return [flat[span].view(-1, width) for span, width in self._matrices]

    def _root_numbers(self, name: str, root: int | Tensor | None, rows: int) -> Tensor:
        """Return the index of the root unit of each row, ``(rows,)``."""
        number = len(self._execution.roots)
        expected = f"an index in 0 .. {number - 1}, or one index per row, for {number} root units"
        require(root is not None or number == 1, name, "root", expected, None)
        if isinstance(root, Tensor):
            whole = not root.is_floating_point() and root.dtype != torch.bool
            require(whole, name, "root", "integers", root.dtype)
            require(root.shape == (rows,), name, "root", f"shape ({rows},)", tuple(root.shape))
            wrong = root[(root < 0) | (root >= number)]
            require(len(wrong) == 0, name, "root", expected, wrong[:1].tolist())
            return root.to(self.weights.device, torch.long)
        one = 0 if root is None else integer(name, "root", root, 0, number - 1, expected=expected)
        return torch.full((rows,), one, device=self.weights.device)

    # --- checks of data, and log-values of leaf units ---------------------------------------------
    def _nothing(self, rows: int = 1) -> Tensor:
        """Return rows of data in which every variable is missing."""
        return torch.full((rows, self.num_variables), -1, device=self.weights.device)

    def _read(self, where: str, x: Tensor, argument: str = "x") -> tuple[Tensor, Tensor]:
        """Check data; return them with 0 for missing entries, and the mask of missing entries.

        Both are ``(B, n)``.
        """
        n, device = self.num_variables, self.weights.device
        require_tensor(where, argument, x)
        fits = x.dim() == 2 and x.shape[1] == n
        require(fits, where, argument, f"shape (B, {n})", tuple(x.shape))
        require(x.device == device, where, argument, device, x.device)
        if x.is_floating_point():
            x = x.to(self.weights.dtype)
        elif x.dtype in (torch.int8, torch.int16):
            x = x.long()  # The number of values may exceed the range of these dtypes.
        missing = x.isnan() if x.is_floating_point() else x < 0
        low = high = math.inf
        if x.numel() and not x.is_floating_point() and x.dtype != torch.uint8:
            low, high = (int(v) for v in torch.aminmax(x))
        for (leaf, *_), names in zip(self.layered.families, self._names, strict=True):
            size = leaf.num_values()
            if size is not None and -1 <= low and high < size:
                continue
            known = signed(x[:, names])
            if size is not None:
                wrong = (known < (0 if x.is_floating_point() else -1)) | (known >= size)
                if x.is_floating_point():
                    wrong |= (known != known.floor()) & ~missing[:, names]
                expected = f"values 0 .. {size - 1}"
            elif isinstance(leaf, External | Indicator):
                continue
            else:
                # Densities square their argument. If the square is infinite, gradients are NaN.
                wrong = known.to(self.weights.dtype).square().isinf()
                expected = f"finite numbers, whose squares are finite in {self.weights.dtype}"
            if wrong.any():
                row, column = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"{where}: {argument}: variable {names[column]}: expected {expected}, found "
                    f"{known[row, column].item()} in row {row}"
                )
        return torch.where(missing, 0, x) if missing.any() else x, missing

    def _leaf_values(self, name: str, x: Tensor, external: Tensor | None) -> Tensor:
        """Return the log-values of the leaf units, ``(B, N)``; 0 for missing variables."""
        if isinstance(x, Tensor) and x.dtype == torch.long and x.device.type == "cpu":
            values = self._looked_up(x)
            if values is not None:
                return values
        return self._leaf_values_of(name, *self._read(name, x), external)

    def _looked_up(self, x: Tensor) -> Tensor | None:
        """Return the log-values of the leaf units by looking them up in a table.

        Return None if the leaves are not of a single finite family on the CPU. Also return None if
        the data are invalid; :meth:`_read` then raises the error.
        """
        if len(self.leaves) != 1 or x.dim() != 2 or x.shape[1] != self.num_variables:
            return None
        leaf = self.layered.families[0][0]
        if not isinstance(leaf, Finite) or self.weights.device.type != "cpu":
            return None
        if self._places is None:
            var, block = self._var[:: self._blocks[0]], self._blocks[0]
            same = torch.equal(var, torch.arange(self.num_variables))
            self._places = None if same else var, self._row[::block].contiguous(), block
        var, row, block = self._places
        table, norm = leaf.looked_up(self._table(0))
        try:
            return ops.circuit_table(
                table, x if var is None else x.index_select(1, var), row, block, norm
            )
        except ValueError:
            return None

    def _leaf_values_of(
        self, name: str, filled: Tensor, missing: Tensor, external: Tensor | None = None
    ) -> Tensor:
        complete = not missing.any()
        dtype = self.weights.dtype
        parts: list[Tensor] = []
        for (leaf, table, span), block in zip(self._families(), self._blocks, strict=True):
            var = self._var[span][::block]
            if isinstance(leaf, External):
                shape = (len(filled), len(var) * block)
                found = None if external is None else tuple(external.shape)
                require(found == shape, name, "external", f"shape {shape}", found)
                assert external is not None
                e = external.to(dtype).unflatten(1, (-1, block))
            elif isinstance(leaf, Indicator):
                hit = filled[:, var, None] == self._indicators[span].view(-1, block)
                e = torch.where(hit, 0.0, -torch.inf).to(dtype)
            elif isinstance(leaf, MultivariateGaussian):
                e = leaf.log_prob(table, self._row[span], self._joint_data(span, filled, missing))
            else:
                e = leaf.log_prob(table, self._row[span], filled[:, var])
            if not complete and not isinstance(leaf, External | MultivariateGaussian):
                e = torch.where(missing[:, var, None], 0, e)
            parts.append(e.flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _refuse_external(self, name: str) -> None:
        """Raise ValueError if there are external leaves: a query cannot pass their values."""
        for leaf, _, span in self._families():
            own = not isinstance(leaf, External)
            variable = int(self._var[span][0])
            require(own, name, f"variable {variable}", "a leaf with parameters", "External")

    # --- files ------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write parameters and structure into one safetensors file."""
        from safetensors.torch import save_file  # imported here, as only this method needs it

        tensors = {k: t.detach().cpu().contiguous() for k, t in self.state_dict().items()}
        text = f'{{"norm": "{self.norm}", "graph": {self.graph.to_json()}}}'
        save_file(tensors, str(path), {_METADATA: text})


def read_file(path: str | Path) -> tuple[RegionGraph, str, dict[str, Tensor]]:
    """Read a file that ``Circuit.save`` wrote; return its graph, norm and tensors.

    Tensors are read only after all checks, since the file is not trusted.
    """
    with contextlib.closing(SafetensorsFile(Path(path))) as file:
        where = file.where
        data = parse_json(file.metadata.get(_METADATA, "null").encode(), where)
        known = isinstance(data, dict) and data.keys() == {"norm", "graph"}
        require(known, where, "header", "a circuit (norm, graph)", f"metadata {[*file.metadata]}")
        norm = data["norm"]
        require(norm in ("logits", "none"), where, "norm", "logits or none", f"{norm!r:.80}")
        graph = RegionGraph.from_json(data["graph"], where)
        units = sum(
            r.units * max(1, r.variables.bit_count()) + graph.num_products(r) for r in graph.regions
        )
        require(units <= _MAX_UNITS, where, "regions", f"at most {_MAX_UNITS} units", units)
        layered = compile_graph(graph)
        wanted: dict[str, tuple[int, ...]] = {"weights": (layered.num_weights,)}
        for i, family in enumerate(layered.families):
            for k, t in _fresh_table(family.leaf, 0, family.size).items():
                wanted[f"leaves.{i}.{k}"] = (family.rows, *t.shape[1:])
        found = {k: info.shape for k, info in file.infos.items()}
        dtypes = {info.dtype for info in file.infos.values()}
        require(found == wanted, where, "tensors", f"{wanted!r:.300}", f"{found!r:.300}")
        one = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}
        require(one, where, "tensors", "tensors in float32 or in float64", dtypes)
        return graph, norm, {k: file.read(k) for k in found}


def _fresh_table(leaf: Leaf, rows: int, size: int) -> Table:
    """Return initial parameters of ``rows`` distributions over ``size`` variables."""
    joint = isinstance(leaf, MultivariateGaussian)
    return leaf.table(rows, size) if joint else leaf.table(rows)
