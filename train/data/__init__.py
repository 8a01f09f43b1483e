"""What training reads: the snapshot's rules, pairs with their pictures, chat rendering, calibration conversations."""
