"""What users would do instead of PASS: one small file each, behind the same interface and closed loop."""
