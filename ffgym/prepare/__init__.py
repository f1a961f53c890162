"""From a dense model and calibration text to pruning paths, and the parts that a run is made of."""
