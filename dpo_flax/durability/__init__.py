"""What keeps a run safe from kills, damage, full disks and other runs."""
