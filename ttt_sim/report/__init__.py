"""Reports: figures, tables and pages made from frames. Nothing here simulates."""
