"""The tabs of the page: what each is built of, and what its events do."""
