"""What a person looks at: drawings, curves, tables."""
