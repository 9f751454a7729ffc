"""How fast dss.predict labels, against transformers' generate:  python -m tests.compare_speed STUDENT ROWS.jsonl

Both read the same student and the same inputs, tokenize them, decode greedily with the same batch size and the same
number of threads, and turn ids into texts; runs alternate, and the ratio is that of the medians. transformers gets the
inputs longest first, as ours sorts them, so that neither pads more than it must. A program, not a test: times on a
shared machine are for people to judge.
"""

import argparse
import statistics
import time

import torch
import transformers

import tokenizer
from data.jsonl import read_jsonl
from dss.batch import PREDICT, encode
from dss.generate import generate
from dss.weights import load_t5


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.compare_speed")
    parser.add_argument("student")
    parser.add_argument("rows")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = [PREDICT + record.input for record in read_jsonl(args.rows)]
    ours, our_tokenizer = load_t5(args.student), tokenizer.T5Tokenizer(args.student)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(args.student).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(args.student)

    def label():
        inputs = [encode(our_tokenizer, text, 1024) for text in texts]
        return [our_tokenizer.decode(ids) for ids in generate(ours, inputs, args.max_new_tokens, args.batch_size)]

    @torch.no_grad()
    def label_with_transformers():
        outputs = [""] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(texts), args.batch_size):
            chosen = order[start : start + args.batch_size]
            batch = their_tokenizer(
                [texts[i] for i in chosen], return_tensors="pt", padding=True, truncation=True, max_length=1024
            )
            ids = theirs.generate(**batch, max_new_tokens=args.max_new_tokens, do_sample=False)
            for i, text in zip(chosen, their_tokenizer.batch_decode(ids, skip_special_tokens=True)):
                outputs[i] = text
        return outputs

    times, answers = {label: [], label_with_transformers: []}, {}
    for _ in range(args.repeats + 1):  # the first round warms up and is not counted
        for run in times:
            clock = time.perf_counter()
            answers[run] = run()
            times[run].append(time.perf_counter() - clock)
    same = sum(a.split() == b.split() for a, b in zip(*answers.values()))
    print(
        f"{len(texts):,} inputs, batch {args.batch_size}, {args.threads} threads, torch {torch.__version__}, ", end=""
    )
    print(f"transformers {transformers.__version__}; {same:,} answers are the same")
    medians = [statistics.median(t[1:]) for t in times.values()]
    for run, t, median in zip(times, times.values(), medians):
        print(f"{run.__name__:<26}{median:8.2f} s  (from {min(t[1:]):.2f} to {max(t[1:]):.2f})")
    print(f"ratio {medians[1] / medians[0]:.2f}")


if __name__ == "__main__":
    main()
