"""The paper's claims in miniature: ``python -m reproduction`` trains, measures, and writes docs/reproduction.md."""
