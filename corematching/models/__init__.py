"""Model families (where their parts are) and loading."""
