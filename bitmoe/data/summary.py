"""What ``bitmoe prepare`` shows: one row a part, with documents, tokens, bytes per token and the place."""

from rich.console import Console
from rich.table import Table

from bitmoe.data.token_data import TokenData


def print_summary(data: TokenData, console: Console | None = None) -> None:
    """Print the table of prepared data to ``console``, by default standard output."""
    table = Table("text", "documents", "training tokens", "held-out tokens", "bytes/token")
    table.add_column("token files", overflow="fold")
    for part in data.parts:
        tokens = part.train.tokens + part.eval.tokens
        table.add_row(
            part.name,
            f"{part.train.documents + part.eval.documents:,}",
            f"{part.train.tokens:,}",
            f"{part.eval.tokens:,}",
            "?" if part.text_bytes is None else f"{part.text_bytes / tokens:.2f}",
            str(part.train.prefix if part.text_bytes is None else part.train.prefix.parent),
        )
    (console or Console()).print(table)
