"""Stage `vision`: the tower learns alone from labels and boxes, under heads that are thrown away afterwards."""
