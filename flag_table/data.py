"""Flags under the heading `items`: tasks, items, how text becomes tokens. A new flag is one line here."""

from __future__ import annotations

from flag_table.flag import Flag, addon, hybrid, reasoner

TABLE = (
    # Prepared triples.
    hybrid("dataset", "path", None, "training data: synthetic (two-digit addition) or a folder of prepared "
           "triples", nullable=True, common=True),
    hybrid("dev_sets", "str", None, "further prepared folders scored at each validation", nullable=True,
           pattern=r"[\w.-]+=[^,].*(?<!,)", form="NAME=DIR,NAME=DIR"),
    hybrid("dataset_workers", "int", 0, "threads that read ahead; capped to the machine's cores", low=0),
    hybrid("max_val_samples", "int", 0, "most validation samples; 0 = the whole split", low=0),
    hybrid("on_bad_line", "str", "error", "what to do at a broken line of a prepared file",
           choices=("error", "skip")),
    # Reasoning Gym tasks.
    addon("task", "str", None, "one task by name: Reasoning Gym's or a built-in one", nullable=True, common=True),
    addon("tasks", "list", None, "several tasks, mixed in equal parts", nullable=True, common=True),
    reasoner("plugin", "path", None, "a Python file of tasks with Reasoning Gym's interface; it runs only when "
             "typed", nullable=True, in_file=False, one_call=True),
    addon("task_config", "json", None, "settings of the tasks; none = small when no task is named, else default",
          nullable=True, form="small, default, a file or a JSON object", common=True, protocol=True),
    # Own data, one more task.
    addon("data", "str", None, "own data as a task: a JSONL, JSON, CSV or parquet file, a folder of them, a data "
          "set of the hub", nullable=True, form="FILE_OR_HUB[:SPLIT]", common=True),
    addon("question_field", "str", "question", "field of a row of --data that holds the question"),
    addon("answer_field", "str", "answer", "field that holds the gold answer"),
    addon("messages_field", "str", None, "field that holds a chat, in place of both: its last assistant turn is the "
          "answer, what precedes it the question", nullable=True),
    addon("eval_data", "str", None, "rows to evaluate on, in place of some held out of --data", nullable=True,
          form="FILE_OR_HUB[:SPLIT]", protocol=True),
    addon("verifier", "str", "exact", "how an answer to --data is judged",
          pattern=r"exact|number|choice|regex:.+|[A-Za-z_][\w.]*:[A-Za-z_]\w*",
          form="exact, number, choice, regex:PATTERN or PKG.MOD:FUNCTION", common=True, protocol=True),
    reasoner("trust_functions", "list", None, "functions of your own (verifiers, rewards) that a file or a checkpoint "
             "names and that may be imported; one typed before on this machine needs it no more", nullable=True,
             in_file=False, one_call=True),
    addon("mix", "str", None, "shares of the tasks in training; a task that is not named weighs 1; none = equal parts",
          nullable=True, pattern=r"[^,=]+=[^,=]+(,[^,=]+=[^,=]+)*", form="NAME=WEIGHT,NAME=WEIGHT"),
    addon("retain", "path", None, "text on which the LLM is to stay as it is: a .txt, .jsonl or parquet file, or a "
          "folder of them", nullable=True),
    addon("train_n", "int", 0, "training items; 0 = fresh items without end, of --data alone all rows", low=0,
          common=True),
    Flag("eval_n", "int", 256, "evaluation items of each task", low=1, common=True),
    addon("group_split", "bool", True, "evaluate a task of few solutions (mini_sudoku) on solutions that are "
          "never trained on, beside questions", protocol=True),
    addon("reserve_tasks", "list", None, "tasks of a later stage: training keeps off what that stage will evaluate",
          nullable=True),
    addon("reserve_config", "json", None, "settings of reserve_tasks, as the later stage's task_config; none = "
          "task_config", nullable=True, form="small, default, a file or a JSON object"),
    reasoner("verifier_strict", "bool", True, "judge answers by a strict rule of the task beside its scorer, "
             "and leave out items whose gold answer fails", before=False, protocol=True),
    # Saving forward passes of the frozen LLM.
    addon("cache_hidden", "str", "off", "where to keep the frozen LLM's hidden states of the train_n items",
          choices=("off", "ram", "disk")),
    addon("cache_dir", "path", None, "folder of the caches on disk, which runs that read the same share",
          nullable=True),
    addon("cache_dtype", "str", "bf16", "what the cache stores a number in; int8 = half the size, with a scale for "
          "each token", choices=("bf16", "int8")),
    addon("cache_mode", "str", "both", "with a cache on disk: fill what is missing and train (both), fill it alone, or "
          "train from a full one without the LLM in memory", choices=("both", "fill", "train")),
    addon("cache_max_gb", "float", 4.0, "largest such cache in GB; a larger one is refused", low=0,
          exclusive_low=True),
    addon("allow_code_tasks", "bool", False, "allow tasks whose verifier executes code; holds only where it is typed",
          one_call=True, file_turns_on=False),
    reasoner("draw_timeout_s", "float", 60.0, "most seconds to make one item; a slower one is passed over; 0 = no "
             "limit", low=0),
    reasoner("score_timeout_s", "float", 10.0, "most seconds to score one answer; a slower one is wrong; 0 = no "
             "limit", low=0, protocol=True),
    # Difficulty that rises with what is solved.
    addon("curriculum", "bool", False, "raise each task through its own levels of difficulty"),
    addon("curriculum_threshold", "float", 0.8, "held-out solved rate at which a task goes up a level", low=0,
          high=1, exclusive_low=True),
    addon("curriculum_levels", "int", 0, "highest level; 0 = the task's last", low=0),
    addon("curriculum_draw_s", "float", 60.0, "most seconds to draw the questions of one level; 0 = no limit",
          low=0),
    # How text becomes tokens.
    addon("sentinel", "str", None, "text appended to every target, at which generation stops", nullable=True,
          protocol=True),
    addon("system_header", "str", None, "text put before every prompt; rg:NAME = that one of Reasoning Gym's "
          "prompts", nullable=True, pattern=r".*", form="text", protocol=True),
    addon("chat_template", "path", None, "a Jinja file in place of the tokenizer's chat template", nullable=True,
          protocol=True),
    addon("chat_template_kwargs", "str", None, "values of the chat template's variables, a JSON object: "
          '{"enable_thinking": false}', nullable=True, pattern=r".*", form="a JSON object", protocol=True),
    addon("prompt_style", "str", "auto", "how a question is put to the LLM; auto = chat if it has a template",
          choices=("auto", "chat", "plain"), protocol=True),
    Flag("max_seq_len", "int", 512, "most tokens of a prompt; the hybrid cuts longer ones", low=8,
         by_arch={"enhanced": 1024}),
    addon("overlong", "str", "error", "what to do with longer prompts", choices=("error", "drop")),
    # Training seeds and evaluation seeds never meet.
    Flag("seed", "int", 0, "seed of weights, training items and order", low=0, high=2**31, exclusive_high=True,
         common=True),
    Flag("eval_seed", "int", 10**9, "evaluation items are drawn from it; every training seed lies far below",
         low=10**9, high=2**32, exclusive_high=True, protocol=True),
)
