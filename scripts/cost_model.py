"""What training the add-on on an LLM of a given size costs: parameters, bytes, products. Arithmetic alone, no torch.

    python scripts/cost_model.py --hidden 1536 --layers 28 --heads 12 --kv_heads 2 --intermediate 8960 \
        --vocabulary 151936 --tied 1 --qkv_bias 1
    python scripts/cost_model.py --known 8B --d_h 256 --batch_size 16 --prompt 120 --answer 30 --processes 8

Modelled is `--adapter hrm` on a Llama-like LLM (gated MLP, grouped heads), without LoRA, ACT, memory tokens and a bias
over the vocabulary; every segment supervised. A FLOP is a multiplication or an addition of a matrix product;
elementwise work is left out. tests/scripts/test_cost_model.py holds each figure against the built model's.
Shapes: S prompt tokens, T answer tokens, N = S + T - 1 columns, D LLM width, d HRM width, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, fields

from script_tools import ScriptParser, run_script

GB = 1e9
FLOAT = 4  # bytes of a number that trains, of its gradient and of its moments
STEP = 4  # bytes of the count that AdamW keeps of each tensor
NEWTON_SCHULZ = 5  # iterations of Muon


@dataclass(frozen=True)
class Llm:
    """Sizes of a frozen LLM, named as in its config.

    head_dim: 0 = hidden / heads.
    tied: 1 = the head is the table of embeddings.
    qkv_bias: 1 = the products for queries, keys and values have biases (Qwen2).
    """

    hidden: int = 1536
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    intermediate: int = 8960
    vocabulary: int = 151936
    head_dim: int = 0
    tied: int = 1
    qkv_bias: int = 1

    @property
    def inner(self) -> int:
        """Channels of all query heads."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def kv_inner(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.inner // self.heads * self.kv_heads

    @property
    def matrices(self) -> int:
        """Parameters of one layer's matrices."""
        attention = self.hidden * (2 * self.inner + 2 * self.kv_inner)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        """Parameters of one layer: matrices, biases, two norms."""
        biases = (self.inner + 2 * self.kv_inner) * self.qkv_bias
        return self.matrices + biases + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All of them: layers, the last norm, embeddings, head."""
        return self.layers * self.layer + self.hidden + self.head * (1 if self.tied else 2)

    def sharded(self, processes: int) -> float:
        """Parameters that each process holds where FSDP shares the layers among them."""
        whole = self.parameters - self.layers * self.layer
        return whole + self.layers * self.layer / processes

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.vocabulary * self.hidden

    def flops(self, columns: int) -> int:
        """Of one text's forward pass without the head; attention counted in full, as dense products."""
        return self.layers * (2 * columns * self.matrices + 4 * columns**2 * self.inner)


KNOWN = {
    "1.5B": Llm(),  # Qwen2.5-1.5B
    "8B": Llm(4096, 32, 32, 8, 14336, 128256, tied=0, qkv_bias=0),  # Llama-3.1-8B
    "70B": Llm(8192, 80, 64, 8, 28672, 128256, tied=0, qkv_bias=0),  # Llama-3.1-70B
}


@dataclass(frozen=True)
class Addon:
    """Sizes of the add-on; each field is the flag of its name in train.py."""

    d_h: int = 128
    h_layers: int = 1
    l_layers: int = 1
    share_hl: int = 0
    inner_T: int = 2
    segments: int = 1
    grad_horizon: str = "full"
    hrm_read: str = "embed+last"
    hrm_conv: int = 1
    state_mix: str = "gated"
    injector: str = "cab"
    injector_sees: str = "hidden+embed"
    optimizer: str = "muon"
    ema: float = 0.998

    # --- parameters ---

    def read_width(self, llm: Llm) -> int:
        """Channels that HRM reads of a token."""
        return {"embed": 1, "last": 1, "embed+last": 2, "all": llm.layers + 1}[self.hrm_read] * llm.hidden

    def seen_width(self, llm: Llm) -> int:
        """Channels that the injector sees of a position."""
        return llm.hidden if self.injector_sees == "embed" else 2 * llm.hidden

    @property
    def mlp(self) -> int:
        """Hidden width of a block's SwiGLU."""
        return math.ceil(self.d_h * 8 / 3 / 8) * 8

    @property
    def block_matrices(self) -> list[tuple[int, int]]:
        """Shapes of the matrices of one layer of H or L."""
        d = self.d_h
        return [(3 * d, d), (d, d), (2 * self.mlp, d), (d, self.mlp)]

    def hidden_matrices(self, llm: Llm) -> list[tuple[int, int]]:
        """Shapes of all matrices that Muon takes."""
        d = self.d_h
        readout = 8 * d // 3
        blocks = self.h_layers if self.share_hl else self.h_layers + self.l_layers
        shapes = [(d, self.read_width(llm)), *self.block_matrices * blocks]
        if self.hrm_conv > 1:
            shapes.append((d, self.hrm_conv * d))

        shapes += [(d, self.seen_width(llm)), (2 * readout, 2 * d), (d, readout)]
        if self.injector == "cab":
            return [*shapes, (d, d), (2 * d, d)]
        return [*shapes, (llm.hidden, 3 * d)]

    def others(self, llm: Llm) -> list[int]:
        """Numbers in each tensor that AdamW takes beside Muon: the zero projection, gates."""
        gates = 0
        if self.state_mix == "gated":
            gates = 3 if self.h_layers else 1
        gate = 1 if self.injector == "cab" else llm.hidden
        return [llm.hidden * self.d_h, gate, *[self.d_h] * gates]

    def parameters(self, llm: Llm) -> int:
        """Trainable ones."""
        return sum(rows * columns for rows, columns in self.hidden_matrices(llm)) + sum(self.others(llm))

    def optimizer_bytes(self, llm: Llm) -> int:
        """Of the optimizer's state: a momentum for each number of Muon's, two moments for each of AdamW's."""
        hidden = [rows * columns for rows, columns in self.hidden_matrices(llm)]
        others = self.others(llm)
        if self.optimizer == "muon":
            return FLOAT * sum(hidden) + 2 * FLOAT * sum(others) + STEP * len(others)
        return 2 * FLOAT * sum(hidden + others) + STEP * len(hidden + others)

    def training_bytes(self, llm: Llm) -> int:
        """What each process holds of the add-on: weights, gradients, optimizer, averaged weights."""
        copies = 3 if self.ema else 2
        return copies * FLOAT * self.parameters(llm) + self.optimizer_bytes(llm)

    # --- products ---

    def block_flops(self, layers: int, prompt: int) -> int:
        """Of one call of H or L, forward, on one example."""
        weights = sum(rows * columns for rows, columns in self.block_matrices)
        return layers * (2 * prompt * weights + 4 * prompt**2 * self.d_h)

    def calls_with_gradient(self) -> int:
        """L calls of a segment that the gradient runs through."""
        if self.grad_horizon == "one_step":
            return 1
        if self.grad_horizon.startswith("k:"):
            return min(int(self.grad_horizon[2:]), self.inner_T)
        return self.inner_T

    def segment_flops(self, llm: Llm, prompt: int, answer: int) -> int:
        """Of one supervised segment on one example, forward and backward, the head among them.

        A matrix whose input does not train costs one product backward, another one two.
        """
        d = self.d_h
        leaf = 2 * prompt * d * self.read_width(llm) + 2 * answer * d * self.seen_width(llm)
        low = self.block_flops(self.l_layers, prompt)
        high = self.block_flops(self.h_layers, prompt)
        conv = 2 * prompt * self.hrm_conv * d * d if self.hrm_conv > 1 else 0

        # The summary that grb reads, and what it makes of it, are alike at all positions.
        readout = 2 * 5 * d * (8 * d // 3) + 2 * d * d
        out = 2 * d * llm.hidden
        if self.injector == "cab":
            inject = answer * (2 * d * d + readout - 2 * d * d + out) + 4 * prompt * d * d + 4 * prompt * answer * d
        else:
            inject = readout - 2 * d * d + out + 2 * answer * 3 * d * llm.hidden

        logits = 2 * answer * llm.head
        forward = self.inner_T * low + high
        backward = 2 * (self.calls_with_gradient() * low + high)
        return 2 * leaf + 3 * (conv + inject) + forward + backward + 2 * logits

    def muon_flops(self, llm: Llm) -> int:
        """Of Muon's orthogonalisation after each supervised segment, whatever the batch."""
        if self.optimizer != "muon":
            return 0
        each = []
        for shape in self.hidden_matrices(llm):
            low, high = sorted(shape)
            each.append(4 * low**2 * high + 2 * low**3)
        return NEWTON_SCHULZ * sum(each)

    def step_flops(self, llm: Llm, batch: int, prompt: int, answer: int, cached: bool) -> int:
        """Of one training step of one process; `cached` = the LLM's layers are not run."""
        read = 0 if cached else llm.flops(prompt + answer - 1)
        segments = self.segments * self.segment_flops(llm, prompt, answer)
        return batch * (read + segments) + self.segments * self.muon_flops(llm)

    # --- bytes ---

    def cache_bytes(self, llm: Llm, columns: int, dtype: str = "bf16") -> int:
        """Of a text of so many kept columns in a cache of hidden states."""
        parts = llm.layers + 2 if self.hrm_read == "all" else 1
        if dtype == "bf16":
            return 2 * parts * llm.hidden * columns
        return parts * (llm.hidden + 4) * columns

    def activation_bytes(self, llm: Llm, prompt: int, answer: int) -> int:
        """What one example keeps for the backward pass of one segment in float32, about; autocast halves most of it."""
        d = self.d_h
        calls = self.calls_with_gradient() * self.l_layers + self.h_layers
        block = 11 * d + 4 * self.mlp
        x = self.read_width(llm) + 3 * d
        injected = 5 * d if self.injector == "cab" else 0
        position = self.seen_width(llm) + 2 * llm.hidden + 9 * d + 4 * (8 * d // 3)
        return FLOAT * (prompt * (calls * block + x + injected) + answer * (position + 2 * llm.vocabulary))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--known", choices=sorted(KNOWN), help="sizes of a known LLM in place of the flags below")
    for kind in (Llm, Addon):
        for field in fields(kind):
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    for name, value, text in (("batch_size", 16, "per process"), ("prompt", 100, "tokens of a prompt"),
                              ("answer", 20, "tokens of an answer"), ("items", 20000, "items of the cache"),
                              ("processes", 1, "processes that train together")):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    parser.add_argument("--cache_dtype", default="bf16", choices=("bf16", "int8"))
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1 and name not in OFF:
            parser.error(f"--{name} {value} must be at least 1")
    return args


OFF = ("head_dim", "tied", "qkv_bias", "h_layers", "share_hl", "ema")  # may be 0


def rows(args: argparse.Namespace) -> list[tuple[str, str]]:
    """What is printed: (what, how much)."""
    llm = KNOWN[args.known] if args.known else Llm(**{field.name: getattr(args, field.name) for field in fields(Llm)})
    addon = Addon(**{field.name: getattr(args, field.name) for field in fields(Addon)})
    columns = args.prompt + args.answer - 1
    example = addon.cache_bytes(llm, columns, args.cache_dtype)
    size = (args.batch_size, args.prompt, args.answer)
    activations = args.batch_size * addon.activation_bytes(llm, args.prompt, args.answer)
    plain = addon.step_flops(llm, *size, cached=False)
    cached = addon.step_flops(llm, *size, cached=True)
    gradients = FLOAT * addon.parameters(llm)

    return [
        ("LLM: parameters", f"{llm.parameters / 1e9:.2f} B"),
        ("LLM: bf16, in each process", f"{2 * llm.parameters / GB:.2f} GB"),
        ("LLM: bf16, in each process, its layers sharded by FSDP", f"{2 * llm.sharded(args.processes) / GB:.2f} GB"),
        ("two layers, whole while one runs and the next is fetched", f"{4 * llm.layer / GB:.2f} GB"),
        ("its head and embeddings of all tokens, bf16, at most (--cache_mode train)", f"{4 * llm.head / GB:.2f} GB"),
        ("add-on: trainable parameters", f"{addon.parameters(llm) / 1e6:.2f} M"),
        ("add-on: weights, gradients, optimizer, average, in each process", f"{addon.training_bytes(llm) / GB:.3f} GB"),
        ("activations of a step in fp32, in each process, about", f"{activations / GB:.2f} GB"),
        (f"cache: an example of {columns} columns", f"{example / 1e6:.2f} MB"),
        (f"cache: {args.items} such items", f"{args.items * example / GB:.1f} GB"),
        (f"filling it: PFLOP, by {args.processes} processes together", f"{args.items * llm.flops(columns) / 1e15:.1f}"),
        ("a step of each process, LLM run: TFLOP", f"{plain / 1e12:.3f}"),
        ("a step of each process, from the cache: TFLOP", f"{cached / 1e12:.3f}"),
        ("times as much without the cache", f"{plain / cached:.1f}"),
        ("sent and received by each process after each segment (DDP, ring)",
         f"{2 * (args.processes - 1) / args.processes * gradients / 1e6:.1f} MB"),
    ]


def main() -> int:
    table = rows(parse())
    width = max(len(what) for what, _ in table)
    for what, much in table:
        print(f"{what:{width}}  {much:>10}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
