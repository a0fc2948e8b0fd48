"""The ops in readable torch: the specification, the oracle of the tests, and the fallback."""
