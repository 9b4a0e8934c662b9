"""Small models of the real classes, so that the demo and the tests run without a download."""
