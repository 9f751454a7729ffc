"""Named studies for dss/study: the paper's settings (Hsieh et al. 2023, section 4, appendix A), ours for a CPU."""

DATASETS = {  # the files that data.official writes; without a validation file, rows are cut from the training rows
    "esnli": dict(data=("esnli_train.jsonl",), eval_data="esnli_valid.jsonl", test_data="esnli_test.jsonl"),
    "anli": dict(data=("anli1_train.jsonl",), eval_data="anli1_valid.jsonl", test_data="anli1_test.jsonl"),
    "cqa": dict(data=("cqa_train.jsonl",), test_data="cqa_test.jsonl", eval_fraction=975 / 9741),  # 8,766 / 975
    "svamp": dict(data=("svamp_train.jsonl",), test_data="svamp_test.jsonl", eval_fraction=0.1),  # 720 / 80
}
PAPER = dict(
    method=("standard", "single_task", "dss"),
    seed=(0, 1, 2, 3),
    lr=5e-5,
    schedule="linear",  # the released code sets no scheduler, and transformers then decays linearly to 0
    warmup=0,
    beta2=0.999,
    weight_decay=0.0,
    eval_every=250,
    max_input_length=1024,
    max_target_length=256,
    max_new_tokens=64,
)
STUDENTS = {
    "base": dict(weights=("google/t5-v1_1-base",), steps=10_000, batch_size=64),
    "large": dict(weights=("google/t5-v1_1-large",), steps=10_000, batch_size=64),
}

CPU = dict(method=("standard", "dss", "label_first", "dss-shuffled"), seed=(0, 1, 2), size=("tiny",), max_new_tokens=8)
NLI = dict(data=("esnli_valid.jsonl",), test_data="esnli_test.jsonl")  # 9,842 rows of the release's validation split

PRESETS = {
    "toy": CPU | dict(subsample=(0.125, 0.25, 0.5, 1.0)),
    "esnli-cpu": CPU | NLI | dict(subsample=(0.25, 1.0), steps=3000, eval_every=300),
    "cqa-cpu": CPU | DATASETS["cqa"] | dict(steps=800, eval_every=200, max_new_tokens=16),
    "svamp-cpu": CPU | DATASETS["svamp"] | dict(steps=600, eval_every=100, max_new_tokens=32),
}
for dataset, files in DATASETS.items():
    for student, shape in STUDENTS.items():
        PRESETS[f"{dataset}-{student}"] = files | PAPER | shape | dict(subsample=(1.0,))  # a row of table 1
