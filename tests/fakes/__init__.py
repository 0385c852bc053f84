"""A pipeline whose stages sleep and write, to test what runs stages without computing anything."""
