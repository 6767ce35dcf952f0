"""Entry of ``python -m benchmarks``; the guard keeps spawned arms from importing the command line."""

if __name__ == "__main__":
    from benchmarks.cli import app

    app(prog_name="python -m benchmarks")
