"""Pages that a person looks at: data in, one self-contained HTML text out."""
