"""Flags under the heading `evaluation`: when and how answers are measured. A new flag is one line here."""

from __future__ import annotations

from flag_table.flag import BLOCKS, RECURRENT, Flag, addon

TABLE = (
    # When to evaluate.
    Flag("eval_only", "bool", False, "evaluate a checkpoint, named by resume or run_name, and stop",
         one_call=True, common=True),
    Flag("eval_every", "int", 380, "batches between evaluations; 0 = only at the end", low=0,
         aliases=("val_every",), by_arch={"hybrid": 1000, "enhanced": 0}, common=True),
    Flag("eval_batch_size", "int", 128, "examples per evaluation batch", low=1, by_arch={"hybrid": 64}),
    # How many segments answer.
    addon("eval_segments", "int", 0, "segments at evaluation; 0 = as trained", low=0, adapters=RECURRENT,
          protocol=True),
    addon("eval_readout", "str", "last", "the segment that answers: the last, or of all segments the one with "
          "the highest halting score; needs use_act", choices=("last", "best_halt"), protocol=True),
    addon("halt_settled", "float", 0.0, "at evaluation an example also stops when a segment changes what "
          "halt_settled_at names by less than this share of its norm; 0 = off", low=0, high=1, adapters=RECURRENT,
          protocol=True),
    addon("halt_settled_at", "str", "answer", "what must settle: what the injector writes where the answer begins, or "
          "z_H over the whole prompt", choices=("answer", "prompt"), before="prompt", adapters=RECURRENT,
          protocol=True),
    addon("eval_injector_scale", "float", 1.0, "factor on the injection at evaluation; 0 = bare LLM", low=0,
          adapters=BLOCKS, protocol=True),
    # How answers are generated.
    addon("decode_temperature", "float", 0.0, "sampling temperature; 0 = greedy", low=0, protocol=True),
    addon("decode_top_p", "float", 1.0, "nucleus sampling; 1 = off", low=0, high=1, exclusive_low=True, protocol=True),
    addon("decode_top_k", "int", 0, "sample among the k likeliest tokens; 0 = off", low=0, protocol=True),
    Flag("max_new_tokens", "int", 0, "longest answer; 0 = longest evaluation target and a margin", low=0,
         protocol=True),
    # How answers are read, and what the bare LLM is given.
    addon("answer_from", "str", "text", "how the answer is taken out of a generated text, of the bare LLM and of the "
          "add-on: the whole text, its last number, the last <answer> tag or \\boxed{}",
          choices=("text", "last_number", "tags", "boxed"), protocol=True),
    addon("bare_max_new_tokens", "int", 0, "longest answer of the bare LLM; 0 = as the add-on's", low=0, protocol=True),
    addon("few_shot", "int", 0, "solved training examples in a second prompt of the bare LLM; 0 = no second prompt",
          low=0, high=100, protocol=True),
    # Benchmarks.
    Flag("eval_suite", "str", None, "benchmarks measured after training and with eval_only: perplexity=FILE, "
         "gsm8k=FILE, mbpp=FILE, science_qa=FILE, synthetic", nullable=True),
    Flag("eval_suite_n", "int", 0, "most items of each entry of the suite; 0 = all", low=0),
    Flag("eval_suite_split", "str", None, "split of the suite's files whose rows name one, such as test; all mixes "
         "them; none = the only one there is", nullable=True),
    Flag("allow_unconfined_code", "bool", False, "run generated code even where nothing can confine it; holds "
         "only where it is typed", one_call=True, file_turns_on=False),
    # Records.
    Flag("log_csv", "path", None, "file of the evaluation table; none = eval.csv in the run folder",
         nullable=True),
    Flag("log_samples_every", "int", 0, "batches between printed samples; 0 = off", low=0),
)
