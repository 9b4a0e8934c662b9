"""From the clips of a manifest to their samples: probed, planned, decoded. Both ways of encoding them use it."""
