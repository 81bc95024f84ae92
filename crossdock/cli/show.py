"""What a person sees of a generation: a bar while weights load, the text as it comes, a summary afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from crossdock.cli.request import Request

BAR = 32  # characters of a full bar


@contextmanager
def loading_bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives `progress(done_bytes, total_bytes)`; drawn on stderr, where that is a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class TextStream:
    """Prints a prompt and what is generated after it, token by token; call it with (prompt number, token id).

    A character can span tokens, so text is held back while it ends in half a character.
    """

    def __init__(self, request: Request, out: TextIO) -> None:
        self.request, self.out = request, out
        self.ids: list[int] = []
        self.printed = ""

    def __call__(self, prompt: int, token: int) -> None:
        if not self.ids:  # not before: until then the request may still fail
            start = self.request.text(self.request.prompts[0])
            self._write(f"prompt {self.request.prompts[0]}\n" if start is None else start)
        self.ids.append(token)
        text = self.request.text(self.ids)
        if text is None:
            self._write(f"{token} ")
        elif not text.endswith("�") and text.startswith(self.printed):
            self._write(text[len(self.printed) :])
            self.printed = text

    def close(self) -> None:
        """Prints what was held back, and a line's end."""
        text = self.request.text(self.ids) or ""
        self._write(text[len(self.printed) :] + "\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def show_generation(answer: dict[str, Any], why: dict[str, str]) -> None:
    """Prints the texts (unless one was streamed already) and the summary of `generate --json`'s object."""
    console = Console()
    if len(answer["outputs"]) > 1:
        for number, output in enumerate(answer["outputs"]):
            console.rule(f"prompt {number}", align="left")
            console.print(escape(output["text"] or str(output["token_ids"])), highlight=False)
    drafted, accepted = answer["speculation"]["drafted"], answer["speculation"]["accepted"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("ranks", str(answer["ranks"]))
    for name in ("device", "dtype", "transport"):
        table.add_row(name, f"{answer[name]} [dim]({escape(why[name])})[/dim]")
    table.add_row("prefill", f"{answer['prefill_tokens_per_s']:.1f} tokens/s")
    table.add_row("decode", f"{answer['decode_tokens_per_s']:.1f} tokens/s")
    if drafted:
        rate = accepted / drafted
        table.add_row("speculation", f"{accepted} of {drafted} drafted tokens accepted ({rate:.0%})")
    table.add_row("logits sha256", f"{answer['logits_digest'][:16]}… [dim](whole with --json)[/dim]")
    load = answer["expert_load"]
    table.add_row("expert load", f"balancedness {load['balancedness']:.3f} [dim](mean / busiest rank)[/dim]")
    largest = max(load["per_rank"]) or 1
    for rank, value in enumerate(load["per_rank"]):
        table.add_row(f"  rank {rank}", f"[cyan]{'█' * round(BAR * value / largest)}[/cyan] {value:g} rows")
    console.rule()
    console.print(table)
