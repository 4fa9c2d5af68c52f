"""Launchers of the kernels on whole rows, which are those of a layer norm in front of a linear map."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import triton_row_gradients as gradients
from . import triton_row_kernels as kernels
from . import tuning
from .sizes import MOST_FEW_ROWS, cdiv, most_sample_parts, next_power_of_2
from .triton_common import (
    OLD_TRITON,
    contiguous,
    dropout_threshold,
    interpreted,
    multiplied,
    multiplies_from_shared_memory,
    multiprocessors,
    on_device,
    split_rows,
)
from .types import LayerNorm, Linear

MOST_FEW_INTERPRETED = 32


def two_tiles(channels: int, even: bool) -> tuple[int, int]:
    """Widths of the two tiles of a row, at least 16 each, which a product needs; `even`: both alike."""
    head = max(next_power_of_2(channels) // 2, 16)
    return head, head if even else max(next_power_of_2(max(channels - head, 1)), 16)


def products_configurations(rows: Rows, outputs: int, more: str) -> list[dict[str, int]]:
    """Of the products that sum over rows: BLOCK_M rows at a time, BLOCK_N columns of the other factor in a program;
    `outputs`: how many it has; `more`: what takes registers beside them, of "", "column" or "dropout"."""
    if rows.x.dtype is torch.float32:
        return [{"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}]
    short = rows.width() <= 256
    # Where operands are held in registers, two stages spill a few bytes on Triton 3.6 (norm_linear), and three as well
    # (separable_attention).
    stages = 1 if short and not rows.from_shared_memory else 2
    first = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": stages}
    if more == "column" and rows.width() > 384:  # 32 spill a few bytes where the norm's share is added up as well
        first["BLOCK_M"] = 16
    others = ({"num_stages": 3 - stages}, {"num_warps": 4}, {"BLOCK_M": 16}, {"BLOCK_M": 64, "num_stages": 1})
    if short and rows.from_shared_memory:
        # of 129 to 192 outputs three blocks of 64 are less than two of 128
        tall = rows.width() <= 160 and not rows.small() and not 128 < outputs <= 192
        first |= {"BLOCK_N": 128 if tall and not more else 64}
        if not (more == "dropout" or (more and OLD_TRITON)):  # which would spill
            first |= {"maxnreg": 128, "BLOCK_M": 16 if more and rows.width() > 192 else 32}
        others = ({"num_stages": 3}, {"num_stages": 1}, {"BLOCK_N": 64}, {"BLOCK_M": 64, "BLOCK_N": 64})
    return [first, *(first | other for other in others)]


def products_configuration(rows: Rows, outputs: int, more: str) -> dict[str, int]:
    name = f"row_products_bwd{'_' if more else ''}{more}{'_few' if rows.small() else ''}"
    return tuning.choose(name, rows.x, (rows.channels, outputs), lambda: products_configurations(rows, outputs, more))


def input_configurations(rows: Rows, tall: bool = False) -> list[dict[str, int]]:
    """Of the gradient of the input: BLOCK_M rows of a program, and the blocks of BLOCK_N outputs that it walks over.
    `tall`: with a multiprocessor to itself."""
    if rows.x.dtype is torch.float32:
        return [{"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}]
    if rows.small():
        return rows.small_tiles("BLOCK_N", shared=False)
    if not rows.from_shared_memory or rows.width() > 256:
        first = {"BLOCK_M": 32, "BLOCK_N": 32 if rows.width() <= 256 else 16, "num_warps": 8, "num_stages": 2}
        return [first]
    block = 128 if rows.width() <= 160 else 64
    first = {"BLOCK_M": block, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 128}
    if tall:
        first = {"BLOCK_M": _tallest_input(rows), "BLOCK_N": 64, "num_warps": 16, "num_stages": 2}
        return [first, first | {"BLOCK_N": 32}, first | {"num_stages": 3}]
    return [first, first | {"BLOCK_N": 64}, first | {"num_stages": 3}, first | {"BLOCK_M": 64, "num_warps": 4}]


def _tallest_input(rows: Rows) -> int:
    """Rows of a program of the gradient of the input with a multiprocessor to itself."""
    return 256 if rows.width() <= 192 else 128


def input_configuration(rows: Rows, outputs: int, of_samples: bool) -> dict[str, int]:
    """`of_samples`: a program's rows are of one sample."""
    block = _tallest_input(rows)
    tall = rows.tall(block) and not (of_samples and rows.rows_per_sample < block)
    name = f"row_input_bwd{'_few' if rows.few() else '_tall' if tall else ''}"
    return tuning.choose(name, rows.x, (rows.channels, outputs), lambda: input_configurations(rows, tall))


def _few(rows: int) -> bool:
    """Whether large tiles of rows would leave most of a GPU idle; the interpreter plays a smaller one."""
    return rows <= (MOST_FEW_INTERPRETED if interpreted() else MOST_FEW_ROWS)


class Rows(NamedTuple):
    """A map (B, H, W, C) as a matrix with a row for each token, for the launchers: contiguous, with its tiles."""

    x: Tensor
    rows: int
    rows_per_sample: int
    channels: int
    tiles: dict[str, int]  # C, HEAD, TAIL
    from_shared_memory: bool  # multiplies_from_shared_memory

    @staticmethod
    def of(x: Tensor) -> Rows:
        batch, height, width, channels = x.shape
        from_shared_memory = multiplies_from_shared_memory(x)
        # where operands are held in registers, those of two shapes make a kernel spill
        head, tail = two_tiles(channels, even=not from_shared_memory)
        rows = batch * height * width
        if from_shared_memory and _few(rows):  # more columns than rows, which warps then share
            tail = max(tail, 32)
        tiles = {"C": channels, "HEAD": head, "TAIL": tail}
        return Rows(x.contiguous(), rows, height * width, channels, tiles, from_shared_memory)

    def block(self) -> int:
        """Rows of a program. Float32 has no matrix units of its own precision; its products are made in registers."""
        if self.x.dtype is torch.float32:
            return 16
        return 64 if self.from_shared_memory and self.width() <= 256 else 32

    def few(self) -> bool:
        """A forward pass of so few rows takes weights as they are."""
        return _few(self.rows)

    def small(self) -> bool:
        """Whether a call takes small tiles: of so few rows others would leave most of a GPU idle."""
        return self.few() and self.from_shared_memory and self.width() <= 256 and self.x.dtype is not torch.float32

    def small_tiles(self, block: str, shared: bool = True) -> list[dict[str, int]]:
        """Configurations of such a call; `block`: what a program walks over, outputs or hidden channels. `shared`:
        programs share that walk. One that has all of it ends sooner with as many warps as a block of it has columns
        for."""
        first = {"BLOCK_M": 16, block: 64, "num_warps": 8, "num_stages": 2}
        if not shared:
            # two stages of weights of more channels do not fit shared memory where they are float32
            first |= {block: 128, "num_warps": 16, "num_stages": 1 if self.width() > 192 else 2}
        return [first, first | {"num_warps": 4}, first | {block: 32}, first | {"BLOCK_M": 32, block: 32}]

    def shares(self, blocks: int, pieces: int) -> int:
        """How many of the `pieces` of a block of rows a program takes: where rows alone do not fill the GPU, programs
        share a block."""
        return cdiv(pieces, min(pieces, max(1, multiprocessors(self.x) // blocks)))

    def tall(self, block: int) -> bool:
        """Whether a forward pass has blocks of so many rows for three quarters of the multiprocessors. A block of 16
        warps fills one and asks the cache for a weight half as often as two of 8 warps and half as many rows."""
        whole = self.from_shared_memory and self.x.dtype is not torch.float32 and self.width() <= 256
        return whole and not self.few() and 4 * cdiv(self.rows, block) >= 3 * multiprocessors(self.x)

    def weights(self, *weights: Tensor) -> tuple[Tensor, ...]:
        """Of a forward pass, as its kernel reads them."""
        return contiguous(*weights) if self.few() else multiplied(self.x, *weights)

    def width(self) -> int:
        """Columns of both tiles."""
        return self.tiles["HEAD"] + self.tiles["TAIL"]

    def float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def statistics(self, eps: float, per_sample: bool) -> tuple[Tensor, Tensor]:
        """mean and rstd = 1 / sqrt(variance + eps). Those of samples are measured; those of tokens are empty, to be
        written by the kernel that reads the rows."""
        mean, rstd = (self.float32(self.x.shape[0] if per_sample else self.rows) for _ in range(2))
        if per_sample and self.rows:
            with on_device(self.x):
                kernels.sample_statistics_kernel[(len(mean),)](
                    self.x, mean, rstd, self.rows_per_sample, eps, **self.tiles, BLOCK_M=32, num_warps=8
                )
        return mean, rstd

    def unhurried(self) -> dict[str, int]:
        """Options with which an old compiler does not spill a register to fit one more block on a multiprocessor."""
        return {"maxnreg": 128} if OLD_TRITON and self.from_shared_memory else {}

    def samples(self) -> int:
        return self.x.shape[0]

    def within_samples(self, config: dict[str, int]) -> dict[str, int]:
        """A configuration for programs with rows of one sample: half as many while a sample has no more."""
        block = config["BLOCK_M"]
        while block > 64 and block >= 2 * self.rows_per_sample:
            block //= 2
        return config if block == config["BLOCK_M"] else config | {"BLOCK_M": block, "num_warps": block // 16}

    def programs_of_samples(self, block: int) -> int:
        """Of `block` rows of one sample."""
        return self.samples() * cdiv(self.rows_per_sample, block)

    def moments(self) -> Tensor:
        """Room for the moments of parts of each sample, as many as there may be."""
        return self.float32(3, self.samples(), most_sample_parts(self.rows_per_sample))

    def part_statistics(self) -> tuple[Tensor, int]:
        """Samples measured in parts, as many as fill the GPU: their `moments`, and the number of parts."""
        samples, moments = self.samples(), self.moments()
        programs = min(8 * multiprocessors(self.x) // samples, moments.shape[2])
        # short parts only until there are two for each multiprocessor
        few = min(2 * multiprocessors(self.x) // samples, moments.shape[2])
        parts, rows_per_part = max(
            split_rows(self.rows_per_sample, few, 32), split_rows(self.rows_per_sample, programs, 256)
        )
        with on_device(self.x):
            kernels.part_statistics_kernel[(samples * parts,)](
                self.x, moments, self.rows_per_sample, rows_per_part, parts, moments.shape[2],
                **self.tiles, BLOCK_M=32, num_warps=8,
            )  # fmt: skip
        return moments, parts

    def input_gradient(
        self,
        dy: Tensor,
        residual: Tensor | None,
        norm: LayerNorm,
        weight: Tensor,
        mean: Tensor,
        rstd: Tensor,
        known: Tensor | None = None,
        made: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The gradient of x where `dy` is that of weight @ norm(x), and that of a residual on top. `known`: the sums of
        each sample that its norm's gradient needs, in parts, (2, samples, parts), float32. `made`: where x is the
        product of a weight with what it was made of, that weight and room for the gradient of that; the norm is of
        tokens then, or its sums are known."""
        dx = torch.empty_like(self.x)
        if not self.rows:
            return dx
        config = input_configuration(self, weight.shape[0], known is not None)
        sums = self.float32(2, self.rows) if norm.per_sample and known is None else None
        programs, parts = cdiv(self.rows, config["BLOCK_M"]), 0
        if known is not None:
            config = self.within_samples(config)
            programs, parts = self.programs_of_samples(config["BLOCK_M"]), known.shape[2]
        gradients.input_bwd_kernel[(programs,)](
            dy, self.x, residual, norm.weight, weight, mean, rstd, known, dx, sums, made,
            self.rows, self.rows_per_sample, self.samples(), parts,
            PER_SAMPLE=norm.per_sample, OUT=weight.shape[0], **self.tiles, **config,
        )  # fmt: skip
        if sums is not None:
            self.finish_input_gradient(dx, residual, mean, rstd, sums)
        return dx

    def finish_input_gradient(
        self, dx: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, sums: Tensor
    ) -> None:
        """What store_norm_gradient leaves to do where the norm is of samples."""
        # One dimension: a grid has 2^31 programs in its first, but 65,535 in the second.
        programs = self.rows // self.rows_per_sample * cdiv(self.rows_per_sample, 32)
        gradients.sample_gradient_kernel[(programs,)](
            self.x, residual, mean, rstd, sums, dx, self.rows, self.rows_per_sample,
            **self.tiles, BLOCK_M=32, num_warps=8,
        )  # fmt: skip

    def normalised_products(
        self,
        a: Tensor,
        mean: Tensor,
        rstd: Tensor,
        per_sample: bool,
        extra: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Parts of a^T n, (parts, OUT, C), for the normalised rows n and a (.., OUT), and of the sums of a, (parts,
        OUT). `extra` (rows,), float32, is one more column of a; there is one output more then. With the `weight` (OUT,
        C) of which a is the gradient also parts of the gradients of the norm's weight and bias, (.., 2, C)."""
        grid, rows_per_part, config = self._products(a, "" if extra is None else "column")
        outputs, columns = a.shape[-1], a.shape[-1] + (extra is not None)
        product, sums = self.float32(grid[1], columns, self.channels), self.float32(grid[1], columns)
        norm = None if weight is None else self.float32(grid[0] * grid[1], 2, self.channels)
        if self.rows:
            gradients.normalised_products_kernel[grid](
                a, extra, self.x, mean, rstd, weight, product, sums, norm,
                self.rows, self.rows_per_sample, rows_per_part,
                PER_SAMPLE=per_sample, OUT=outputs, **self.tiles, **config,
            )  # fmt: skip
        return (product, sums) if norm is None else (product, sums, norm)

    def products(self, a: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Parts of a^T d, (parts, OUT, C), where d is x after its dropout and a is (.., OUT), and of the sums of d,
        (parts, C)."""
        grid, rows_per_part, config = self._products(a, "dropout" if dropout > 0 else "")
        product, sums = self.float32(grid[1], a.shape[-1], self.channels), self.float32(grid[1], self.channels)
        if self.rows:
            gradients.dropped_products_kernel[grid](
                a, self.x, seed if dropout > 0 else None, product, sums, self.rows, self.rows_per_sample,
                rows_per_part, dropout_threshold(dropout), 1 / (1 - dropout),
                OUT=a.shape[-1], **self.tiles, **config,
            )  # fmt: skip
        return product, sums

    def _products(self, a: Tensor, more: str) -> tuple[tuple[int, int], int, dict[str, int]]:
        """Grid (blocks of columns of a, parts), rows of a part and configuration of the products that sum over rows."""
        config = products_configuration(self, a.shape[-1], more)
        blocks = cdiv(a.shape[-1], config["BLOCK_N"])
        parts, rows_per_part = split_rows(self.rows, 2 * multiprocessors(self.x) // blocks, config["BLOCK_M"])
        return (blocks, parts), rows_per_part, config

    def norm_linear_backward(
        self,
        dy: Tensor,
        norm: LayerNorm,
        linear: Linear,
        mean: Tensor,
        rstd: Tensor,
        residual: Tensor | None = None,
        rounded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of x (with that of a residual on top), norm weight, norm bias, weight and bias (empty without
        one), where `dy` is that of linear(norm(x)). `rounded`: the weight as `multiplied`, where that is at hand."""
        dx, parts = self.norm_linear_parts(dy, norm, linear, mean, rstd, residual, rounded)
        outputs = linear.weight.shape[0]
        with on_device(self.x):
            gradients.norm_linear_gradient_kernel[(cdiv(self.channels, 32), cdiv(outputs, 16))](
                *parts.tensors, *parts.counts, OUT=outputs, C=self.channels, BLOCK_C=32, BLOCK_O=16, num_warps=4
            )
        return dx, *parts.gradients(dx)

    def norm_linear_parts(
        self,
        dy: Tensor,
        norm: LayerNorm,
        linear: Linear,
        mean: Tensor,
        rstd: Tensor,
        residual: Tensor | None = None,
        rounded: Tensor | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Parts]:
        """The gradient of x, and what norm_linear_gradient_kernel makes those of the parameters of."""
        norm = norm._replace(weight=norm.weight.contiguous(), bias=norm.bias.contiguous())
        with on_device(self.x):
            if rounded is None:
                (rounded,) = multiplied(self.x, linear.weight)
            dx = self.input_gradient(dy, residual, norm, rounded, mean, rstd, known)
            sums = self.normalised_products(dy, mean, rstd, norm.per_sample, weight=rounded)
        written = tuple(gradient_like(t) for t in (norm.weight, norm.bias, *linear))
        return dx, Parts((*sums, norm.weight, norm.bias, *written), (len(sums[0]), len(sums[2])), 4)

    def second_weight_backward(
        self, dy: Tensor, hidden: Tensor, linear: Linear, dropout: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias (empty without one) of dropout(linear(hidden)), `hidden` being (rows, F)."""
        parts, outputs = self.second_weight_parts(dy, hidden, linear, dropout, seed), hidden.shape[1]
        with on_device(self.x):
            gradients.second_gradient_kernel[(cdiv(self.channels, 32), cdiv(outputs, 32))](
                *parts.tensors, *parts.counts, F=outputs, C=self.channels, BLOCK_C=32, BLOCK_F=32, num_warps=4
            )
        return parts.gradients(dy)

    def second_weight_parts(
        self, dy: Tensor, hidden: Tensor, linear: Linear, dropout: float, seed: Tensor | None
    ) -> Parts:
        """What second_gradient_kernel makes these of."""
        with on_device(self.x):
            product, sums = self._replace(x=dy).products(hidden, dropout, seed)
        return Parts((product, sums, *(gradient_like(t) for t in linear)), (len(product),), 2)


class Parts(NamedTuple):
    """What a kernel finishes gradients of parameters from: its tensors, of which the last `written` are these
    gradients (None: there is no such parameter), and its numbers of parts."""

    tensors: tuple[Tensor | None, ...]
    counts: tuple[int, ...]
    written: int

    def gradients(self, like: Tensor) -> tuple[Tensor, ...]:
        """Those that it writes; empty without a parameter."""
        return tuple(like.new_empty(0) if t is None else t for t in self.tensors[-self.written :])


def gradient_like(parameter: Tensor | None) -> Tensor | None:
    """Space for the gradient of a parameter, where there is one."""
    return None if parameter is None else torch.empty_like(parameter, memory_format=torch.contiguous_format)
