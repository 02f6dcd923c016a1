"""Runs: tracking, store, batches, settings, reports."""
