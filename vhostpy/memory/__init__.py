"""Guest memory: mappings, generations, translation, dirty log."""
