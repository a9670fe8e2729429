"""Our network and our data in the shapes that other libraries take (docs/adapters.md)."""
