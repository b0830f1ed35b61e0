"""An LSTM's cells in fewer operators than OneFlow's: most of a step's time is the calling of them.

The inputs' share of all gates is one product over the whole sequence, and so are the gradients of
the weights; what is left for each cell is one product and a handful of elementwise operators.
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import oneflow as flow
from oneflow.autograd import Function

from ofengine.speedups.functions import refuse_second_derivatives


class _Cells(Function):
    """The cells of one layer, one after the other, from the inputs' share of their gates.

    ``x`` is (steps, rows, 4 width), the gates in OneFlow's order: input, forget, cell, output;
    ``weight`` (4 width, width); ``h`` and ``c`` (rows, width). Returns all ``h``, the last ``c``.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, h: Any, c: Any) -> Tuple[Any, Any]:
        width = h.shape[1]
        of_hidden = weight.transpose(0, 1).contiguous()
        hs, cs, gates, tanhs = [h], [c], [], []
        for each in x.unbind(0):
            z = each + flow.matmul(h, of_hidden)
            squashed = z.sigmoid()
            i, f, _, o = squashed.chunk(4, dim=1)
            g = z[:, 2 * width : 3 * width].tanh()
            c = f * c + i * g
            tanh = c.tanh()
            h = o * tanh
            hs.append(h)
            cs.append(c)
            tanhs.append(tanh)
            gates.append(flow.cat([i, f, g, o], dim=1))
        before, ended = flow.stack(hs[:-1]), flow.stack(hs[1:])
        ctx.save_for_backward(
            weight, before, flow.stack(cs[:-1]), flow.stack(gates), flow.stack(tanhs)
        )
        return ended, c

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_c: Any) -> Tuple[Any, ...]:
        refuse_second_derivatives()
        weight, before, cs, gates, tanhs = ctx.saved_tensors
        i, f, g, o = gates.chunk(4, dim=2)
        # What a cell's and an output's gradient are multiplied by, of all steps at once.
        through = flow.cat(
            [g * i * (1 - i), cs * f * (1 - f), i * (1 - g * g), tanhs * o * (1 - o)], 2
        )
        into_cell = (o * (1 - tanhs * tanhs)).unbind(0)
        forget, through, grads = f.contiguous().unbind(0), through.unbind(0), grad.unbind(0)
        dh: Optional[Any] = None
        dc, dzs = grad_c, []
        for t in reversed(range(len(grads))):
            dh = grads[t] if dh is None else grads[t] + dh
            dc = dh * into_cell[t] + dc
            dz = flow.cat([dc, dc, dc, dh], 1) * through[t]
            dzs.append(dz)
            dc = dc * forget[t]
            dh = flow.matmul(dz, weight)
        all_dz = flow.stack(dzs[::-1])
        flat = all_dz.reshape(-1, all_dz.shape[2])
        of_weight = flow.matmul(flat, before.reshape(-1, before.shape[2]), transpose_a=True)
        return all_dz, of_weight, dh, dc


def lstm(x: Any, layers: List[Tuple[Any, ...]], h: Any, c: Any) -> Tuple[Any, Any, Any]:
    """An LSTM of some ``layers``, each (weight_ih, weight_hh, biases ...).

    ``x`` is (steps, rows, features), ``h`` and ``c`` (layers, rows, width). Returns what the last
    layer puts out, and the last ``h`` and ``c`` of each.
    """
    last_h, last_c = [], []
    for number, (weight_ih, weight_hh, *biases) in enumerate(layers):
        gates = flow.matmul(x.reshape(-1, x.shape[2]), weight_ih, transpose_b=True)
        if biases:
            gates = gates + (biases[0] + biases[1])
        gates = gates.reshape(x.shape[0], x.shape[1], -1)
        x, end = _Cells.apply(gates, weight_hh, h[number], c[number])
        last_h.append(x[-1])
        last_c.append(end)
    return x, flow.stack(last_h), flow.stack(last_c)
