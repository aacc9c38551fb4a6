"""The loss on the held-out items, the gold answers fed in: a signal for early stopping, and no accuracy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from batching import Batch, PromptFormat
from engine.batches import IGNORE
from engine.placement import device_of
from engine.sharding import idle_turns
from engine.stopping import stop_point
from model import AdapterController
from reasoning_gym_wrapper import Example


@torch.no_grad()
def held_out_loss(
    controller: AdapterController, prompt_format: PromptFormat, examples: Sequence[Example], batch_size: int,
    autocast: Callable[[], contextlib.AbstractContextManager], idle: Sequence[Example] = (),
) -> tuple[float, int]:
    """(summed nats, answer tokens) of the gold answers after all segments; items without one are left out.

    The model's mode stays as it was. With a sharded LLM, whose processes read as many batches, the first of the items
    `idle` with a gold answer is read, and not counted, where only the others still have batches.
    """
    golden = [example for example in examples if example.target is not None]
    golden.sort(key=lambda example: len(example.question))  # so that batches hold little padding
    earlier = controller.config.segments - 1 if controller.recurrent else 0
    device = device_of(controller)
    turns = idle_turns(controller, -(-len(golden) // batch_size))

    def loss_of(batch: Batch) -> float:
        with autocast():
            return float(controller.segment(controller.encode(batch), batch.labels, None, 1.0, earlier).loss)

    was_training = controller.training
    controller.eval()
    nats = 0.0
    tokens = 0
    try:
        for start in range(0, len(golden), batch_size):
            stop_point()
            batch = prompt_format.batch(golden[start : start + batch_size]).to(device)
            nats += loss_of(batch)
            tokens += int((batch.labels != IGNORE).sum())
        for _ in range(turns):
            spare = next(example for example in idle if example.target is not None)
            loss_of(prompt_format.batch([spare]).to(device))
    finally:
        controller.train(was_training)
    return nats, tokens
