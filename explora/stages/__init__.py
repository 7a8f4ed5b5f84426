"""The verbs: here alone neighbouring rooms meet; each stage composes them and hands over files."""
