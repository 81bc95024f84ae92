"""Text from a checkpoint, by the library: the bundled example, or a Hugging Face directory.

python examples/generate.py [DIRECTORY]         # or under torchrun, experts spread over its ranks
"""

import sys
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer

import crossdock

PROMPTS = ["def read_lines(path):\n", "class Stack:\n", "for name in "]
bundled = Path(str(files("crossdock"))) / "data" / "example"
directory = Path(sys.argv[1]) if len(sys.argv) > 1 else bundled

with crossdock.init() as group:
    transport = crossdock.make_transport(group)
    loaded = crossdock.load_model(directory, transport, dtype=torch.float32, device=group.device)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    result = crossdock.generate(
        loaded.model,
        [tokenizer.encode(prompt).ids for prompt in PROMPTS],
        transport,
        max_new_tokens=32,
        stop_ids=loaded.stop_ids,
        draft_tokens=3 if loaded.model.has_mtp else 0,
        device=group.device,
    )
    if group.rank == 0:  # every rank has all results
        for output in result.outputs:
            print("---\n" + tokenizer.decode(output.prompt_ids + output.token_ids))
        print(f"---\n{result.accepted} of {result.drafted} drafted tokens accepted, logits sha256 {result.digest}")
