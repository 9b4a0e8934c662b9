"""The job on Ray. Only the files of this folder know Ray; what they call runs without it."""
