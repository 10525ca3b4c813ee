"""Parts that need an optional package; nothing here is imported by `import jacops`."""
