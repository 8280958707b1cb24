"""What the dense vision data sets share: reading maps, checking lists and files, transforms, boundary maps."""
