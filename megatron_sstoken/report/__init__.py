"""What a run did, for people: token records read, sampled and summed up, as a page and as ranked samples."""
