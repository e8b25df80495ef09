"""Requirements and attacks by their ids; docs/security.md says which test proves which."""
