"""Lightning callbacks: weight sync, staleness, ledger, progress and summary."""
