"""How things look: values in, markup out; the style sheet and the browser's script."""
