"""Offline stand-ins of the language suites: tiny base models, and small data in the layouts of the real ones."""
