"""llama.cpp in a process of its own: reads one JSON line with a model, a control vector and rows, writes one back.

Run by the environment that holds xllamacpp. A row is `{"prompt": [ids], "text": [ids], "greedy": bool}`; the answer
holds, per row, the log-probability of each token of the text after the prompt and, where it is asked for, the greedy
continuation of the prompt.
"""

import ctypes
import json
import sys

import numpy as np
import xllamacpp.xllamacpp


class Llama:
    def __init__(self, shim: str, model: str, vector: str, context: int) -> None:
        ctypes.CDLL(xllamacpp.xllamacpp.__file__, ctypes.RTLD_GLOBAL)  # all of llama.cpp's symbols
        self.shim = ctypes.CDLL(shim)
        threads = 1  # of several, those that wait for the others spin
        self.vocabulary = self.shim.qs_open(model.encode(), vector.encode(), context, threads)
        if not self.vocabulary:
            sys.exit(f"llama.cpp does not open {model} with {vector or 'no control vector'}")

    def logits(self, ids: list[int], begin: int) -> np.ndarray:
        out = np.zeros((len(ids), self.vocabulary), np.float32)
        given = (ctypes.c_int * len(ids))(*ids)
        if self.shim.qs_logits(given, len(ids), begin, out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))):
            sys.exit("llama.cpp does not decode")
        return out

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        made = [int(self.logits(prompt, 0)[-1].argmax())]
        while len(made) < steps:
            made.append(int(self.logits(made[-1:], len(prompt) + len(made) - 1)[0].argmax()))
        return made

    def log_probabilities(self, prompt: list[int], text: list[int]) -> list[float]:
        logits = self.logits(prompt + text[:-1], 0)[len(prompt) - 1 :].astype(np.float64)
        top = logits.max(-1)
        all_of = top + np.log(np.exp(logits - top[:, None]).sum(-1))
        return (logits[np.arange(len(text)), text] - all_of).tolist()


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    llama = Llama(asked["shim"], asked["model"], asked["vector"], asked["context"])
    rows = [
        {
            "greedy": llama.greedy(row["prompt"], len(row["text"])) if row["greedy"] else None,
            "log_probabilities": llama.log_probabilities(row["prompt"], row["text"]),
        }
        for row in asked["rows"]
    ]
    with open(asked["answer"], "w", encoding="utf-8") as file:
        json.dump(rows, file)


main()
