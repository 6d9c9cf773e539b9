"""Evaluate many points θ + scale·z in one forward: rows of different points share each product with W.

    y_i = x_i Wᵀ + bias + (scale_i / sqrt(r)) (x_i B_i) A_iᵀ        i: a slice of rows, all at the same point

A product with W is computed once, for all rows. What is added to it differs from slice to slice, and is two thin
products for a matrix (see `low_rank`). Vectors are perturbed for each point, and rows of embeddings as they are looked
up. Reads that cannot be told apart by rows are refused by name.

B. Sarkar et al., "Evolution Strategies at the Hyperscale" (EGGROLL, arXiv 2511.16652).
"""

import math
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from zofo import noise
from zofo.errors import ZofoError
from zofo.noise import Distribution, Sum, Term, representable, stream_key
from zofo.zo.estimators import Point
from zofo.zo.low_rank import Matrix, Read, is_matrix, read_of, require_rank
from zofo.zo.perturb import require_members, require_read
from zofo.zo.watch import ACTIVE, METADATA, Noticed, in_place, plain_class, watched

INSTEAD = "set zo_members_per_forward: 1, or zo_distribution: normal"

_PRODUCTS = frozenset[Any]((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul))


Rows = tuple[Point, int]
"""A point, and how many rows of a forward, one after the other, are evaluated there."""


@contextmanager
def population(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    seed: int,
    rows: Sequence[Rows],
    step: int = 0,
    *,
    distribution: Distribution = "normal",
    rank: int = 1,
    require_all: bool = True,
) -> Generator[None]:
    """Within the block, a forward of all `rows` evaluates each of them at its own point θ + scale·z_query.

    θ is never written, and no gradients flow. Extra memory: A and B of one matrix, its thin products, and a copy of a
    vector for each point. Blocks do not nest. Not thread-safe, as `perturbed`.

    Args:
        model: whose parameters they are.
        parameters: name -> tensor; float32, bfloat16 or float16.
        seed: the run's seed.
        rows: which rows of the forward, in their order along the first dimension, are evaluated where; a scale is in
            the weights' unit and rounded as `noise.representable` says; at scale 0 the point is θ.
        step: the optimizer step.
        distribution: of A, B and vectors, a row of `noise.eager.SHAPES`.
        rank: r, of the directions of matrices.
        require_all: refuse parameters that were never read, if anything ran in the block.

    Raises:
        ZofoError: if a parameter is none of the model's, was never read, has a smaller rank, or is read in a way that
            cannot be told apart by rows.

    Examples:
        >>> layer, x = nn.Linear(2, 1), torch.ones(2, 2)
        >>> with torch.no_grad(), population(layer, dict(layer.named_parameters()), 1, [((0.5, 0), 1), ((0.0, 0), 1)]):
        ...     moved, same = layer(x)
        >>> bool(moved != layer(x)[0]), bool(same == layer(x)[1])
        (True, True)
    """
    if ACTIVE:
        raise ZofoError("a population cannot be opened inside a perturbed block or another population")
    require_rank(parameters, rank)
    if require_all:
        require_members(model, parameters)
    reader = _Reader(parameters, seed, step, rows, rank, distribution)
    classes = {name: plain_class(type(p)) for name, p in parameters.items()}
    noticed = Noticed(reader, reader.names)
    try:
        ACTIVE.append(reader)
        for name, plain in classes.items():
            parameters[name].__class__ = watched(plain)
        with torch.no_grad(), noticed if require_all else nullcontext():
            yield
    finally:
        ACTIVE.clear()  # first: a watched class that Ctrl-C leaves behind does nothing without it
        for name, plain in classes.items():
            parameters[name].__class__ = plain
    if noticed.anything:
        require_read(parameters, reader.seen)


class _Apart(Tensor):
    """A tensor that has a value for each point, and no rows: what is computed from vectors alone."""

    at_points: list[Tensor]
    reader: "_Reader"
    parameter: str  # the name of one that it was computed from

    @classmethod
    def of(cls, values: Sequence[Tensor], reader: "_Reader", name: str) -> "_Apart":
        made = torch.empty(0).as_subclass(cls)  # its own memory is never read
        made.at_points, made.reader, made.parameter = list(values), reader, name
        return made

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage] torch's documented way
            values = _flat([*args, *(kwargs or {}).values()])
            found = next(value for value in values if isinstance(value, cls))
            return found.reader.call(func, args, kwargs or {})


class _Reader:
    """Answers the torch functions that read parameters."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        seed: int,
        step: int,
        rows: Sequence[Rows],
        rank: int,
        distribution: Distribution,
    ) -> None:
        self.thread = threading.get_ident()
        self.asked = 0
        self.seen = set[str]()
        self.names = {id(p): name for name, p in parameters.items()}
        self._parameters = list(parameters.values())  # keeps the ids alive
        self._seed, self._step, self._rank = seed, step, rank
        self._distribution: Distribution = distribution
        points = [(representable(scale, distribution) if scale else 0.0, query) for (scale, query), _ in rows]
        self._points = list(dict.fromkeys(points))
        self._blocks = [(self._points.index(point), count) for point, (_, count) in zip(points, rows, strict=True)]
        self._total = sum(count for _, count in self._blocks)
        equal = len({count for _, count in self._blocks}) == 1
        # of equal parts of the rows: all blocks if these are equal, else single rows
        self._slices = [point for point, count in self._blocks for _ in range(1 if equal else count)]
        queries = [query for _, query in self._points]
        self._queries = range(min(queries), max(queries) + 1)
        places = torch.tensor([self._points[point][1] - self._queries.start for point in self._slices])
        scales = torch.tensor([self._points[point][0] / math.sqrt(rank) for point in self._slices])[:, None, None]
        devices = dict.fromkeys(p.device for p in parameters.values())
        # of each slice, which of the directions is its own and with which scale
        self._of_devices = {device: (places.to(device), scales.to(device)) for device in devices}

    def holds(self, block: object) -> bool:
        """Whether this is what is open."""
        return block is self

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a torch function returns, for all rows."""
        self.asked += 1
        if func in METADATA:
            return func(*map(_example, args), **kwargs)
        if (read := read_of(func, args, kwargs)) and id(read.x) not in self.names and not isinstance(read.x, _Apart):
            return self._read(read, func)
        values = [*args, *kwargs.values()]
        moved = [value for value in values if id(value) in self.names or isinstance(value, _Apart)]
        if not moved or (in_place(func) and args and args[0] is moved[0]) or "out" in kwargs or func is Tensor.data_ptr:
            self._refuse(func, values)
        for value in moved:
            if id(value) in self.names and value.ndim > 1:
                self._refuse(func, [value])
        if func in _PRODUCTS and len(args) == 2 and len(moved) == 1:
            other = args[1] if args[0] is moved[0] else args[0]
            if self._has_rows(other) and other.shape[-1:] == _example(moved[0]).shape and _example(moved[0]).ndim == 1:
                return self._multiplied(other, self._copies(moved[0]))
        return self._one_by_one(func, args, kwargs)

    def _read(self, read: Read, func: Callable[..., Any]) -> Tensor:
        """A product with a matrix, or its rows, and a bias."""
        moves, bias_moves = id(read.weight) in self.names, id(read.bias) in self.names
        if (moves and not is_matrix(read.weight)) or isinstance(read.weight, _Apart):
            self._refuse(func, [read.weight])
        if func is functional.embedding and (read.x.ndim == 1 or len(read.x) == 1):
            read = read._replace(x=read.x.expand(self._total, *read.x.shape[-1:]))  # the same positions for all rows
        if not self._has_rows(read.x):
            self._refuse(func, [read.weight, read.bias])
        result = read.plain(None if bias_moves else read.bias)
        if not result.numel():
            return result
        parts = result.view(len(self._slices), -1, result.shape[-1])
        if moves:
            self._plus(read, parts)
        if bias_moves:
            assert read.bias is not None
            parts += self._of_slices(self._copies(read.bias)).unsqueeze(1)
        return result

    def _plus(self, read: Read, parts: Tensor) -> None:
        """Adds to the result of a read, (slices, T, ...), what its directions change."""
        name = self.names[id(read.weight)]
        self.seen.add(name)
        drawn = Matrix(read.weight, name, self._rank, self._distribution).drawn(self._seed, self._step, self._queries)
        queries, scales = self._of_devices[parts.device]
        a, b = drawn[0].to(parts.dtype), (drawn[1][queries] * scales).to(parts.dtype)
        if read.func is functional.embedding:
            ids = read.x.reshape(len(parts), -1)
            parts.baddbmm_(a[queries[:, None], :, ids], b)
            return
        right, left = (b, a[queries]) if read.func is functional.linear else (a[queries], b)
        x = read.x.reshape(len(parts), -1, read.x.shape[-1])
        parts.baddbmm_(torch.bmm(x, right.transpose(1, 2)), left)

    def _copies(self, vector: Tensor) -> list[Tensor]:
        """A vector at every point."""
        if isinstance(vector, _Apart):
            return vector.at_points
        name, plain = self.names[id(vector)], vector.detach()
        self.seen.add(name)
        copies = plain.new_empty(len(self._points), *plain.shape)
        terms = [[Term(stream_key(self._seed, self._step, query, name), scale)] for scale, query in self._points]
        noise.write_sums([Sum(plain, c, t) for c, t in zip(copies, terms, strict=True)], self._distribution)
        return list(copies)

    def _of_slices(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([values[point] for point in self._slices])

    def _multiplied(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Each slice of rows times its vector, along the last dimension."""
        vectors = self._of_slices(values).unsqueeze(1)
        return (x.reshape(len(self._slices), -1, x.shape[-1]) * vectors).view(x.shape)

    def _one_by_one(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of vectors for each block of rows alone; for each point, where none of its arguments has rows."""
        values = [*args, *kwargs.values()]
        copies = {id(v): self._copies(v) for v in values if id(v) in self.names or isinstance(v, _Apart)}
        if any(map(self._has_rows, (value for value in values if id(value) not in copies))):
            results, low = list[Any](), 0
            for point, count in self._blocks:
                high = low + count

                def of_block(value: Any, point: int = point, low: int = low, high: int = high) -> Any:
                    if id(value) in copies:
                        return copies[id(value)][point]
                    if not self._has_rows(value):
                        return value
                    each = len(value) // self._total
                    return value[low * each : high * each]

                results.append(func(*map(of_block, args), **{key: of_block(value) for key, value in kwargs.items()}))
                low = high
            return self._whole(results, func, values)

        def at(value: Any, point: int) -> Any:
            return copies[id(value)][point] if id(value) in copies else value

        results = [
            func(*(at(value, point) for value in args), **{key: at(value, point) for key, value in kwargs.items()})
            for point in range(len(self._points))
        ]
        if all(isinstance(result, Tensor) for result in results):
            first = next(value for value in values if id(value) in copies)
            return _Apart.of(results, self, first.parameter if isinstance(first, _Apart) else self.names[id(first)])
        return results[0] if all(result == results[0] for result in results) else self._refuse(func, values)

    def _whole(self, results: Sequence[Any], func: Callable[..., Any], values: Iterable[Any]) -> Tensor:
        counts = [count for _, count in self._blocks]
        each = [
            len(r) / count if isinstance(r, Tensor) and r.ndim else 0.0
            for r, count in zip(results, counts, strict=True)
        ]
        if not each[0] or any(number != each[0] for number in each):
            self._refuse(func, values)
        return torch.cat(list(results))

    def _has_rows(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or isinstance(value, Parameter):  # which may be as long by chance
            return False
        return value.ndim > 0 and len(value) > 0 and len(value) % self._total == 0

    def _refuse(self, func: Callable[..., Any], values: Iterable[Any]) -> NoReturn:
        leaves = _flat(values)
        named = [self.names[id(value)] for value in leaves if id(value) in self.names]
        named += [value.parameter for value in leaves if isinstance(value, _Apart)]
        raise ZofoError(
            f"{named[0] if named else 'a weight'} is read by {func.__name__}, whose result cannot be told apart by the "
            f"rows of several directions: {INSTEAD}"
        )


def _example(value: Any) -> Any:
    """A value as it is at one of the points."""
    return value.at_points[0] if isinstance(value, _Apart) else value


def _flat(values: Iterable[Any]) -> list[Any]:
    """Values, and those in lists and tuples among them."""
    return [leaf for value in values for leaf in (_flat(value) if isinstance(value, list | tuple) else [value])]
