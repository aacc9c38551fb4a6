"""Runs generated code with its tests in a confined process."""
